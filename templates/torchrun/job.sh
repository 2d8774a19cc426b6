#!/bin/bash
# $title
$facts
#
# It ends with the run's code: $preempted when its state is saved and it is to be started again, on all machines.

command=(
  $command
)

if [ -z "$$NODE_RANK" ] || [ -z "$$MASTER_ADDR" ]; then
  echo "error: NODE_RANK, this machine's number from 0, and MASTER_ADDR, the address of number 0, have to be set." >&2
  exit 2
fi

# torchrun kills its processes 30 seconds after a request to stop, and ends with 1 whatever they end with. So it hears of
# no request; they go to the run's command, the first of the processes here, which leaves its number and its code.
left=$$(mktemp -d)
trap 'rm -rf "$$left"' EXIT
trap '[ ! -s "$$left/run" ] || kill -TERM "$$(cat "$$left/run")"' HUP INT TERM USR1
(
  trap '' HUP INT TERM USR1
  # shellcheck disable=SC2016
  exec torchrun --nnodes=$machines --node-rank="$$NODE_RANK" --nproc-per-node=$processes_each \
    --master-addr="$$MASTER_ADDR" --master-port="$${MASTER_PORT:-$port}" --signals-to-handle=SIGQUIT --no-python bash -c '
      "$$@" &
      [ "$$LOCAL_RANK" -ne 0 ] || echo "$$!" > "$$0/run"
      wait "$$!"
      code=$$?
      [ "$$LOCAL_RANK" -ne 0 ] || echo "$$code" > "$$0/code"
      exit "$$code"' "$$left" "$${command[@]}"
) &
launcher=$$!
wait "$$launcher"
code=$$?
while kill -0 "$$launcher" 2> /dev/null; do  # a request ends the waiting, not what is waited for
  wait "$$launcher"
  code=$$?
done
[ ! -s "$$left/code" ] || code=$$(cat "$$left/code")
exit "$$code"
