"""Per-example gradients of a model: sketches, exact statistics, and exact products with reference directions."""
