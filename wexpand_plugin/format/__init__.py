"""What is on disk: row pools, config.json, the files of a model. Needs torch and safetensors."""
