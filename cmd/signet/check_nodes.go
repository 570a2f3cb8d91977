package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/signet-ca/signet/internal/kube"
)

// A kNode is what of a node is looked at.
type kNode struct {
	Metadata kMeta `json:"metadata"`
	Status   struct {
		Conditions []kCondition `json:"conditions"`
	} `json:"status"`
}

// ready says whether its kubelet is alive.
func (n *kNode) ready() bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c kCondition) bool { return c.Type == "Ready" && c.Status == "True" })
}

// other says whether it is of a kind that never has an agent.
func (n *kNode) other() bool {
	return n.Metadata.Labels["type"] == "virtual-kubelet" || n.Metadata.Labels["kubernetes.io/os"] == "windows"
}

// checkNodes looks whether pods with the volume can start on each node: it needs a ready agent, and kubelet must know it.
func (i *checkup) checkNodes(ctx context.Context) {
	registered, err := i.registered(ctx)
	if err != nil {
		i.cannot("nodes", "", "list CSINodes", err)
		return
	}
	all, good, skipped := 0, 0, 0
	var rows []*checkRow
	tell := func(result, node, found, do string) {
		rows = append(rows, &checkRow{Result: result, Object: "node/" + node, Found: found, Do: do})
	}
	err = kube.Each(ctx, i.cluster, in("v1", "", "nodes", ""), nil, func(n kNode) error {
		name := n.Metadata.Name
		if n.other() {
			skipped++
			return nil
		}
		all++
		agent := i.agents[name]
		switch {
		case !n.ready():
			tell(resultWarning, name, "the node itself is not ready", i.kf.kubectl("describe", "node", name))
		case agent == nil:
			tell(resultBad, name, "it has no agent: no pod with the volume starts here", i.kf.kubectl("-n", i.kf.namespace, "get", "pods", "-o", "wide")+"   # does the DaemonSet's nodeSelector or affinity leave it out?")
		case !agent.ready():
			tell(resultBad, name, "its agent is not ready", i.kf.kubectl("-n", i.kf.namespace, "logs", agent.Metadata.Name))
		case !registered[name]:
			tell(resultBad, name, "kubelet has not registered the volume plugin "+i.config.driver()+", though the agent runs: is agent.kubeletDir kubelet's --root-dir?",
				i.kf.kubectl("-n", i.kf.namespace, "logs", agent.Metadata.Name))
		default:
			good++
		}
		return nil
	})
	if err != nil {
		i.cannot("nodes", "", "list nodes", err)
		return
	}
	for n, row := range rows {
		if n == maxNamed {
			i.add("nodes", resultBad, "", fmt.Sprintf("and %s more", plural(len(rows)-n, "node")), i.kf.kubectl("-n", i.kf.namespace, "get", "pods", "-o", "wide"))
			break
		}
		i.add("nodes", row.Result, row.Object, row.Found, row.Do)
	}
	if good == all {
		i.good("nodes", "", "%d of %s with a ready agent that kubelet knows%s", good, plural(all, "node"), after("; not looked at: ", others(skipped)))
	}
}

func others(n int) string {
	if n == 0 {
		return ""
	}
	return plural(n, "node") + " of Windows or without a kubelet"
}

// registered are the nodes whose kubelet knows the driver.
func (i *checkup) registered(ctx context.Context) (map[string]bool, error) {
	type node struct {
		Metadata kMeta `json:"metadata"`
		Spec     struct {
			Drivers []struct {
				Name string `json:"name"`
			} `json:"drivers"`
		} `json:"spec"`
	}
	has := map[string]bool{}
	err := kube.Each(ctx, i.cluster, in("storage.k8s.io/v1", "", "csinodes", ""), nil, func(n node) error {
		for _, d := range n.Spec.Drivers {
			if d.Name == i.config.driver() {
				has[n.Metadata.Name] = true
			}
		}
		return nil
	})
	return has, err
}
