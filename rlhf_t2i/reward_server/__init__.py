"""Any reward behind HTTP: server, wire format and dynamic batching."""
