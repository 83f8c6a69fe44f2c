"""Training after conversion: recipes that call TRL (SFT, DPO, GRPO) on a converted model."""
