"""The paper's two central claims, checked on the models at hand."""
