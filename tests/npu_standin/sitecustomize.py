"""Makes torch_npu compute on the CPU. Python runs this at its start, by PYTHONPATH."""
import os
import traceback

if os.environ.get("NPU_STANDIN") == "1":
    try:
        import fakenpu  # noqa: F401
        import npuref  # noqa: F401
    except Exception as error:
        # a Python without torch needs no NPU
        if getattr(error, "name", None) != "torch":
            traceback.print_exc()
            os._exit(1)                 # Python itself would report one line and go on
