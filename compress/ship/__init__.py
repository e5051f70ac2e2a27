"""What a deployment team receives: the bundle, its manifest and its sums."""
