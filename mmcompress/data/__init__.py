"""Where examples come from: bundled scenes, local files, hub data sets."""
