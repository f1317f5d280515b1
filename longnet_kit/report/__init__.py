"""Drawing: figures for TensorBoard, patterns as text."""
