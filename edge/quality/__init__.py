"""What an artifact costs against its checkpoint: KL divergence, perplexity, agreement, acceptance, tensor by tensor."""
