"""The command line and what it calls: pack, unpack, inspect, verify, report, synth."""
