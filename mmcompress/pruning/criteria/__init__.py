"""One file a criterion: what a unit or a layer is worth. Found by name on first use."""
