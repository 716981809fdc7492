"""The one training loop, its data feed, and the distillation losses that fine-tuning, distillation and QAT share."""
