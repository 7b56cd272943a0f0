#!/usr/bin/env bash
# Records how an API server tells of the same pods and nodes in protobuf and in JSON, and how it refuses.
#
#   make up MODE=control-plane
#   KUBECONFIG=.lab/admin.kubeconfig PATH=$PWD/.lab/bin:$PATH operator/k8s/src/protobuf/golden/make.sh
#
# Wants a cluster of Kubernetes 1.34 or newer for tests, with no pods of its own; leaves it as it was. Needs kubectl, curl and jq.
set -euo pipefail
cd "$(dirname "$0")"
port=${PORT:-18001}

remove() {
  kubectl patch pod golden-rich -n default --type=merge -p '{"metadata":{"finalizers":null}}' >/dev/null 2>&1 || true
  kubectl delete --ignore-not-found --now -f objects.yaml >/dev/null 2>&1 || true
}
trap 'remove; kill "$proxy" 2>/dev/null' EXIT
kubectl proxy --port="$port" >/dev/null &
proxy=$!

remove
kubectl create --save-config=false -f objects.yaml >/dev/null
kubectl patch pod golden-rich -n default --subresource=status --type=merge --patch-file=status.yaml >/dev/null
kubectl patch pod golden-plain -n default --subresource=status --type=merge --patch-file=plain.yaml >/dev/null
kubectl patch node golden --subresource=status --type=merge --patch-file=node.yaml >/dev/null
kubectl delete pod golden-rich -n default --wait=false >/dev/null

# watch FORM PATH : what a streamed list tells of the golden objects, for three seconds.
watch() {
  curl -sS -H "Accept: $1" "http://127.0.0.1:$port/api/v1/$2&watch=true&timeoutSeconds=3&allowWatchBookmarks=true"
}
stream='sendInitialEvents=true&resourceVersionMatch=NotOlderThan'
protobuf=application/vnd.kubernetes.protobuf
# What is the same each time: bookmarks and one message name the version of the day.
same() {
  jq -c 'select(.type != "BOOKMARK") | del(.object.message)' "$@"
}
# Each between two of JSON, until those are the same; at once, before controllers find that no kubelet stands behind the node.
for pair in "nodes nodes?fieldSelector=metadata.name%3Dgolden&$stream" "pods namespaces/default/pods?$stream" \
  "ended pods?$stream&resourceVersion=9999999"; do
  read -r name path <<<"$pair"
  for _ in 1 2 3; do
    watch application/json "$path" >"$name.json"
    watch $protobuf "$path" >"$name.pb"
    [ "$(watch application/json "$path" | same)" = "$(same "$name.json")" ] && break
  done
done
refused='pods?fieldSelector=spec.colour%3Dred&watch=true'
curl -sS -H "Accept: $protobuf" "http://127.0.0.1:$port/api/v1/$refused" >refused.pb
curl -sS "http://127.0.0.1:$port/api/v1/$refused" | jq -c . >refused.json
wc -c ./*.pb ./*.json
