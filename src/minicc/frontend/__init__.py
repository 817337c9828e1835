"""From ONNX to the graph IR: `minicc.frontend.model.load_model`."""
