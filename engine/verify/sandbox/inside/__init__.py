"""Inside the sandbox: what runs on the far side of engine/verify/sandbox/host.py. The standard library only."""
