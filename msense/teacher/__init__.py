"""Teachers: any Hugging Face encoder or decoder, read from safetensors, with remote code disabled."""
