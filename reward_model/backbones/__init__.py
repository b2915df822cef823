"""Families of multimodal LLMs behind one interface (`types.Backbone`), one file a family.

Also what they share: prompts to token ids, Qwen's patches, and the run of the language model.
"""
