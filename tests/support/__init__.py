"""What several tests share: tiny models, families, a pretended device, decoding in numpy."""
