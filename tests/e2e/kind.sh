#!/usr/bin/env bash
# A kind cluster without kube-proxy: create, build, load, deploy, wait until ready, smoke-test. Needs Docker.
#
#   tests/e2e/kind.sh            all of it; leaves the cluster there to look at
#   tests/e2e/kind.sh delete     remove the cluster
set -euo pipefail
cd "$(dirname "$0")/../.."

cluster=$(sed -n 's/^name: //p' kind-config.yaml)
context=kind-$cluster
image=ebproxy:kind
clients=${SMOKE_IMAGE:-busybox:1.37}
namespace=ebproxy-smoke

say() { printf '\n== %s\n' "$*"; }
fail() {
	printf 'FAILED: %s\n' "$*" >&2
	exit 1
}
k() { kubectl --context "$context" "$@"; }

need() {
	local tool missing=()
	for tool in docker kind kubectl; do
		command -v "$tool" >/dev/null || missing+=("$tool")
	done
	((${#missing[@]} == 0)) || fail "this needs ${missing[*]}: https://kind.sigs.k8s.io/docs/user/quick-start"
	docker info >/dev/null 2>&1 || fail "no Docker engine answers"
}

create() {
	kind get clusters 2>/dev/null | grep -qx "$cluster" && return
	say "creating cluster $cluster"
	# Without Services nothing gets ready: waiting for that here would be in vain.
	kind create cluster --config kind-config.yaml --wait 0s
}

build_and_load() {
	say "building $image"
	docker build --tag "$image" .
	say "loading $image"
	kind load docker-image --name "$cluster" "$image"
}

deploy() {
	say "deploying"
	k apply -k manifests/overlays/kind
	# The tag stays the same, so the image of a second run is taken up by a restart.
	k -n kube-system rollout restart daemonset/ebproxy
	k -n kube-system rollout status daemonset/ebproxy --timeout 5m
	k wait --for condition=Ready nodes --all --timeout 5m
	k -n kube-system rollout status deployment/coredns --timeout 5m
}

# Two servers that answer with their name over HTTP, and a client on every node.
plant() {
	say "a Deployment, a Service, clients"
	k create namespace "$namespace" --dry-run=client -o yaml | k apply -f -
	k -n "$namespace" apply -f - <<-EOF
		apiVersion: apps/v1
		kind: Deployment
		metadata: {name: web}
		spec:
		  replicas: 2
		  selector: {matchLabels: {app: web}}
		  template:
		    metadata: {labels: {app: web}}
		    spec:
		      containers:
		        - name: web
		          image: $clients
		          command: [sh, -c, 'mkdir /www && hostname >/www/index.html && exec httpd -f -p 8080 -h /www']
		          readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
		---
		apiVersion: v1
		kind: Service
		metadata: {name: web}
		spec:
		  ipFamilyPolicy: RequireDualStack
		  selector: {app: web}
		  ports: [{name: http, port: 80, targetPort: 8080}]
		---
		apiVersion: v1
		kind: Service
		metadata: {name: empty}
		spec:
		  selector: {app: nobody}
		  ports: [{name: http, port: 80}]
		---
		apiVersion: apps/v1
		kind: DaemonSet
		metadata: {name: client}
		spec:
		  selector: {matchLabels: {app: client}}
		  template:
		    metadata: {labels: {app: client}}
		    spec:
		      tolerations: [{operator: Exists}]
		      terminationGracePeriodSeconds: 1
		      containers: [{name: client, image: $clients, command: [sleep, infinity]}]
	EOF
	k -n "$namespace" rollout status deployment/web --timeout 3m
	k -n "$namespace" rollout status daemonset/client --timeout 3m
}

pods() { k -n "$1" get pods -l "$2" -o jsonpath='{range .items[*]}{.metadata.name}{"\n"}{end}'; }

fetch() { # POD URL
	k -n "$namespace" exec "$1" -- wget -q -T 5 -O - "$2"
}

both_answer() { # POD URL
	local names=""
	for _ in $(seq 20); do
		names+=$(fetch "$1" "$2")$'\n' || fail "$1 does not reach $2"
	done
	[ "$(sort -u <<<"${names%$'\n'}" | wc -l)" = 2 ] || fail "$1 reaches not both servers at $2: $names"
}

smoke_pod() { # POD
	local pod=$1 address
	for address in $(k -n "$namespace" get service web -o jsonpath='{.spec.clusterIPs[*]}'); do
		case $address in *:*) address="[$address]" ;; esac
		both_answer "$pod" "http://$address/"
	done
	both_answer "$pod" "http://web.$namespace.svc.cluster.local/" # DNS is a Service too, over UDP
	local said
	said=$(fetch "$pod" "http://empty.$namespace.svc.cluster.local/" 2>&1) && fail "a Service without endpoints answered"
	grep -qi refused <<<"$said" || fail "a Service without endpoints was not refused: $said"
	echo "ok  $pod"
}

smoke() {
	local pod
	say "ebproxy status on every node"
	for pod in $(pods kube-system app.kubernetes.io/name=ebproxy); do
		k -n kube-system exec "$pod" -- ebproxy status --wait 30 >/dev/null || fail "$pod is not settled"
		echo "ok  $pod"
	done
	say "ClusterIPs of both families, DNS and refusal, from a pod on every node"
	for pod in $(pods "$namespace" app=client); do
		smoke_pod "$pod"
	done
	say "all of it works; look around with: kubectl --context $context -n kube-system exec ds/ebproxy -- ebproxy status"
}

need
if [ "${1:-}" = delete ]; then
	kind delete cluster --name "$cluster"
	exit
fi
create
build_and_load
deploy
plant
smoke
k delete namespace "$namespace" --wait=false
