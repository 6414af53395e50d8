"""Models in safetensors, read by kvbits itself: from the map into place, with the quantization that they carry."""
