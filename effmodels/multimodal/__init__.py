"""Images beside text: encoders, resamplers and the ways of joining them with the tokens of a row; see docs/multimodal.md."""
