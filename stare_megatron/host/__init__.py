"""The machine under a process: devices, ports, memory, files and their checksums."""
