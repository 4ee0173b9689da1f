"""Python runs this when it starts with this folder on PYTHONPATH: from then on torch_npu computes on the CPU."""
import os
import traceback

if os.environ.get("NPU_STANDIN") == "1":
    try:
        import fakenpu  # noqa: F401
        import npuref  # noqa: F401
    except Exception as error:
        if getattr(error, "name", None) != "torch":     # else a Python without torch, which needs no NPU
            traceback.print_exc()
            os._exit(1)                 # Python itself would report one line and go on
