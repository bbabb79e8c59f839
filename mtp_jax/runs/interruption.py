"""SIGTERM or Ctrl-C ends a run after the current step; a second signal ends it at once."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mtp_jax.errors import end_at_once
from mtp_jax.sharding import AXES, replicated

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Use as a context in the main thread; ask `requested` once a step."""

    def __init__(self, mesh: jax.sharding.Mesh, say: Callable[[str], None]):
        self.mesh, self.say = mesh, say
        self.signal = 0  # the first that this process received
        self.undo = contextlib.ExitStack()
        self.latest: jax.Array | None = None
        self.largest = jax.jit(jnp.max, out_shardings=replicated(mesh))

    def requested(self) -> int:
        """The signal to end after, 0 for none: the same in all processes at the same step.

        Each process puts its signal into a maximum over all devices, which runs behind the step, and reads the one of
        the step before, so that no process waits.
        """
        if jax.process_count() == 1:
            return self.signal
        mine = np.array([self.signal], np.int32)
        spread = NamedSharding(self.mesh, PartitionSpec(AXES))
        before = self.latest
        self.latest = self.largest(jax.make_array_from_callback((self.mesh.size,), spread, lambda _: mine))
        return 0 if before is None else int(before)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is not threading.main_thread():
            return self  # handlers belong to the main thread
        # Python runs a handler only when the main thread returns from whatever it computes or waits for; the number of
        # a signal is written to this socket as soon as it arrives.
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.undo.callback(ours.close)
        self.undo.callback(theirs.close)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self.undo.callback(signal.set_wakeup_fd, before)
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN:  # ignored by nohup, and by shells for background commands
                signal.signal(number, lambda *_: None)
                self.undo.callback(signal.signal, number, signal.SIG_DFL if handler is None else handler)
        threading.Thread(target=self._listen, args=(ours,), name="signals", daemon=True).start()
        return self

    def _listen(self, ours: socket.socket) -> None:
        while True:
            try:
                numbers = ours.recv(1)
            except OSError:
                return
            if not numbers:
                return
            if numbers[0] not in _SIGNALS:
                continue
            if self.signal:
                end_at_once(128 + numbers[0])
            self.signal = numbers[0]
            name = signal.Signals(self.signal).name
            self.say(f"{name}: saving after this step; a second signal ends the run at once")

    def __exit__(self, *_: Any) -> None:
        self.undo.close()
