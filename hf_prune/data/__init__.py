"""Images in: datasets, decoding, transforms, loaders."""
