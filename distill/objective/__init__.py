"""What is minimised: divergences, the chunked loss, the pair of models, cached targets of the teacher."""
