"""What any engine must do. To have another one tested, add its factory to ``ENGINES`` in ``conftest.py``.

The tests use nothing but ``inference_gateway.engine.base.Engine``, and compare with transformers alone in fp64.
"""
