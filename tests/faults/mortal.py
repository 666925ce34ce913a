"""A simulation that takes no time, whose process can be ordered to die; of runs on workers, which import it."""
import os
import signal
import threading
import time
from pathlib import Path

from symbnn.studies.runs import simulation


@simulation
def mortal(seed: int, a: int, orders: str) -> dict:
    """The file `orders`/a says how often, and after how many seconds, the process of this run is killed."""
    order = Path(orders) / str(a)
    if order.exists():
        often, seconds = order.read_text().split()
        if often == "once":
            order.unlink()
        threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()
    time.sleep(0.02)
    return {"value": a + seed, "accuracy": 0.5}
