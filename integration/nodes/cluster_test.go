//go:build cluster && linux

package nodes_test

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/signet-ca/signet/integration/nodes"
)

// answer is what `probe get` prints.
type answer struct {
	Failed int
	Last   string
}

// get has the probe in a pod send requests.
func get(ctx context.Context, c *nodes.Cluster, pod string, times int, url string) (answer, error) {
	out, err := c.Kubectl(ctx, "", "exec", "-n", "plain", pod, "--", "/probe", "get", fmt.Sprint(times), url)
	if err != nil {
		return answer{}, err
	}
	var a answer
	return a, json.Unmarshal([]byte(out), &a)
}

func TestCluster(t *testing.T) {
	c := nodes.Start(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Events(context.Background()))
		}
	})
	c.Apply(t, `
{apiVersion: v1, kind: Namespace, metadata: {name: plain}}
---
{apiVersion: v1, kind: Service, metadata: {name: server, namespace: plain}, spec: {selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: plain, labels: {app: server}}
spec:
  nodeName: node1
  containers: [{name: main, image: "localhost/signet-probe:1", args: [serve, ":8080"], imagePullPolicy: Never}]
---
apiVersion: v1
kind: Pod
metadata: {name: beside, namespace: plain}
spec:
  nodeName: node1
  containers: [{name: main, image: "localhost/signet-probe:1", imagePullPolicy: Never}]
---
apiVersion: v1
kind: Pod
metadata: {name: across, namespace: plain}
spec:
  nodeName: node2
  containers: [{name: main, image: "localhost/signet-probe:1", imagePullPolicy: Never}]
`)
	c.Wait(t, "pod", "-n", "plain", "--all", "--for=condition=Ready")
	for _, pod := range []string{"beside", "across"} {
		nodes.Eventually(t, pod, func(ctx context.Context) error {
			a, err := get(ctx, c, pod, 3, "http://server.plain.svc")
			if err == nil && a.Failed > 0 {
				err = fmt.Errorf("%+v", a)
			}
			return err
		})
	}
}
