"""Code that runs inside the sandbox. Imports only the standard library. The host side is engine/verify/sandbox/host.py."""
