"""One file a model family. A family says what towers a model has, what can be cut and which config keys follow."""
