"""Publication of a finished run: its folder, its model card, and the upload to the Hugging Face Hub.

The only package that imports huggingface_hub, apart from the download of reward models in `reward_model`.
"""
