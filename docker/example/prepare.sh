#!/bin/sh
# The coordinator's folder of the example, made once.
set -eu
umask 077
study=/var/lib/uharmony/study
[ -f "$study/study.json" ] ||
  uharmony-server init /example/study.yaml --dir "$study" --address coordinator:8443
