"""Publication of a finished run: bundle, model card and upload. The only folder that knows the Hub."""
