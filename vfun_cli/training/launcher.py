"""``accelerate launch``, with two more places where the ranks of a job can meet: the loopback address of one machine,
and beside the store of a launcher that has started the commands of several machines.

It also tells the ranks whether the number of threads that accelerate gives them is the user's or accelerate's own.

torchrun's own meeting places listen on every address of the machine, and their store answers whoever connects.
"""

import os
import socket
from collections.abc import MutableMapping
from functools import cached_property

from vfun_cli.children import SHARE_CORES, THREADS
from vfun_cli.imports import uncollected

with uncollected():
    from accelerate.commands.launch import main
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.rendezvous import (
        RendezvousInfo,
        RendezvousParameters,
        RendezvousStoreInfo,
        rendezvous_handler_registry,
    )
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous


class Loopback(StaticTCPRendezvous):
    """A static meeting of one machine, at this port of the loopback address; at a free one for 0."""

    name = "loopback"

    def __init__(self, parameters: RendezvousParameters) -> None:
        address, _, port = parameters.endpoint.rpartition(":")
        super().__init__(
            address,
            int(port),
            rank=int(parameters.get("rank", 0)),
            world_size=parameters.max_nodes,
            run_id=parameters.run_id,
            timeout=int(parameters.get("timeout", 600)),
        )

    def get_backend(self) -> str:
        """Its name in torchrun's registry."""
        return self.name

    @cached_property
    def store(self) -> TCPStore:
        """The store, which has its port from now on.

        Raises:
            OSError: the port is taken.
        """
        return self._served(socket.create_server((self.master_addr, self.master_port)))

    def _served(self, listening: socket.socket) -> TCPStore:
        """A store of this process. It cannot be told an address, but takes a socket that has one."""
        port = listening.getsockname()[1]
        return TCPStore(
            self.master_addr, port, self.world_size, True, self.timeout, master_listen_fd=listening.detach()
        )

    def next_rendezvous(self) -> RendezvousInfo:
        """What torchrun gives to the ranks."""
        where = RendezvousStoreInfo(self.master_addr, self.store.port)
        return RendezvousInfo(PrefixStore(self.run_id, self.store), self.rank, self.world_size, where)


class BesideStore(Loopback):
    """A static meeting of several machines at a free port of the first. They learn it from the store at the endpoint,
    where the launcher that has started their commands listens itself.
    """

    name = "beside-store"

    @cached_property
    def store(self) -> TCPStore:
        """The store of this launch: each machine counts its own, and all launch as often."""
        outer = TCPStore(self.master_addr, self.master_port, is_master=False, timeout=self.timeout)
        known = PrefixStore(f"vfun-{self.run_id}", outer)
        launch = known.add(f"launches of {self.rank}", 1)
        if self.rank == 0:
            listening = socket.create_server((self.master_addr, 0))
            known.set(f"port {launch}", str(listening.getsockname()[1]))
            return self._served(listening)
        port = int(known.get(f"port {launch}"))
        return TCPStore(self.master_addr, port, self.world_size, False, self.timeout)


def let_ranks_share_cores(environ: MutableMapping[str, str]) -> None:
    """Unless their number of threads is stated, which is the last moment to see that: accelerate always states one."""
    if THREADS not in environ:
        environ[SHARE_CORES] = "1"


if __name__ == "__main__":
    let_ranks_share_cores(os.environ)
    for place in (Loopback, BesideStore):
        rendezvous_handler_registry.register(place.name, place)
    main()
