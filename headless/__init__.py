"""EditKit without ComfyUI: the command line, the runner of workflows with stand-ins for stock nodes, and the client of a server."""
