package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/signet-ca/signet/internal/kube"
)

// How long a pod may take before it counts as stuck: to get its volume once it has a node, and to go once it should have.
const (
	slowStart = 20 * time.Second
	slowEnd   = time.Minute
)

// finishedFor is how long ago a pod's last container must have ended before its volume is taken to be gone as well:
// kubelet removes the volumes of finished pods, a moment after.
const finishedFor = time.Minute

// volumePods calls f for each pod of the cluster that has a volume of the driver.
func volumePods(ctx context.Context, cluster *kube.Operator, driver string, f func(p *kPod)) error {
	return kube.Each(ctx, cluster, in("v1", "", "pods", ""), nil, func(p kPod) error {
		if has, _ := p.volume(driver); has {
			f(&p)
		}
		return nil
	})
}

// finished says whether kubelet has nothing of the pod any more but its record.
func (p *kPod) finished(now time.Time) bool {
	if p.Status.Phase != "Succeeded" && p.Status.Phase != "Failed" {
		return false
	}
	for _, c := range slices.Concat(p.Status.Inits, p.Status.Containers) {
		if t := c.State.Terminated; t != nil && now.Sub(t.FinishedAt) < finishedFor {
			return false
		}
	}
	return true
}

// checkPods looks at the pods that have our volume.
func (i *checkup) checkPods(ctx context.Context) {
	all, stuck := 0, 0
	var writable []string
	var waiting []*kPod
	err := volumePods(ctx, i.cluster, i.config.driver(), func(p *kPod) {
		all++
		if _, readOnly := p.volume(i.config.driver()); !readOnly && !p.finished(i.now) {
			writable = append(writable, namespaced(p.Metadata.Namespace, "pod", p.Metadata.Name))
		}
		if i.stuck(p) {
			if stuck++; len(waiting) < maxNamed {
				waiting = append(waiting, p)
			}
		}
	})
	if err != nil {
		i.cannot("pods", "", "list the pods of all namespaces", err)
		return
	}
	for n, pod := range writable {
		if n == maxNamed {
			i.add("read-only", resultBad, "", fmt.Sprintf("and %s more", plural(len(writable)-n, "pod")), "set readOnly: true in each")
			break
		}
		i.add("read-only", resultBad, pod, "its volume is not readOnly: the agent refuses it, for the pod could replace its socket", "in the pod's template: "+volumeYAML)
	}
	if len(writable) == 0 {
		i.good("read-only", "", "all volumes are readOnly")
	}
	for _, p := range waiting {
		found, do := i.podTrouble(ctx, p)
		if !p.Metadata.DeletionTimestamp.IsZero() {
			found = "it should be gone since " + duration.HumanDuration(i.now.Sub(p.Metadata.DeletionTimestamp)) + "; without a working agent on its node its volume cannot be removed" + after(": ", found)
		}
		i.add("pods", resultBad, namespaced(p.Metadata.Namespace, "pod", p.Metadata.Name), found+after(" (node ", p.Spec.NodeName)+closing(p.Spec.NodeName), do)
	}
	switch {
	case stuck > len(waiting):
		i.add("pods", resultBad, "", fmt.Sprintf("and %s more are stuck", plural(stuck-len(waiting), "pod")), i.kf.kubectl("get", "pods", "-A"))
	case stuck == 0:
		i.good("pods", "", "%s with the volume, none stuck", plural(all, "pod"))
	}
}

func closing(opened string) string {
	if opened == "" {
		return ""
	}
	return ")"
}

// stuck says whether a pod with the volume waits for longer than a volume explains.
func (i *checkup) stuck(p *kPod) bool {
	switch {
	case p.finished(i.now) || p.Spec.NodeName == "":
		return false
	case !p.Metadata.DeletionTimestamp.IsZero():
		return i.now.Sub(p.Metadata.DeletionTimestamp) > slowEnd
	case p.Status.Phase != "Pending":
		return false
	}
	since := p.Metadata.CreationTimestamp
	if c, ok := p.condition("PodScheduled"); ok && c.LastTransitionTime.After(since) {
		since = c.LastTransitionTime
	}
	if i.now.Sub(since) <= slowStart {
		return false
	}
	if c, ok := p.condition("PodReadyToStartContainers"); ok {
		return c.Status != "True" // it has its volumes and runs its init containers, or cannot have its images
	}
	for _, c := range slices.Concat(p.Status.Inits, p.Status.Containers) {
		if c.State.Running != nil || c.State.Terminated != nil {
			return false
		}
	}
	return true
}

// podTrouble says why a pod is not ready, and what to type to see more.
func (i *checkup) podTrouble(ctx context.Context, p *kPod) (found, do string) {
	describe := i.kf.kubectl("-n", p.Metadata.Namespace, "describe", "pod", p.Metadata.Name)
	if c, ok := p.condition("PodScheduled"); ok && c.Status != "True" {
		return "no node takes it: " + clip(c.Reason+": "+c.Message, maxFound), describe
	}
	if p.Status.Reason != "" && p.Status.Phase == "Failed" {
		return clip(p.Status.Reason+": "+p.Status.Message, maxFound), describe
	}
	for _, c := range slices.Concat(p.Status.Inits, p.Status.Containers) {
		if said := containerTrouble(c); said != "" {
			if c.LastState.Terminated != nil || c.State.Terminated != nil {
				logs := []string{"-n", p.Metadata.Namespace, "logs", p.Metadata.Name, "-c", c.Name}
				if c.State.Terminated == nil {
					logs = append(logs, "--previous")
				}
				return said, i.kf.kubectl(logs...)
			}
			return said, describe
		}
	}
	if said := i.newestWarning(ctx, p.Metadata.Namespace, p.Metadata.UID); said != "" {
		return said, describe
	}
	for _, c := range p.Status.Containers {
		if c.State.Running != nil && !c.Ready {
			return "container " + clip(c.Name, 63) + " runs and is not ready", i.kf.kubectl("-n", p.Metadata.Namespace, "logs", p.Metadata.Name, "-c", c.Name)
		}
	}
	age := duration.HumanDuration(i.now.Sub(p.Metadata.CreationTimestamp))
	return "it is " + clip(strings.ToLower(p.Status.Phase), 32) + ", made " + age + " ago, and no event says why", describe
}

// containerTrouble is what a container's status says is wrong with it; "" where it says nothing but that it is not there
// yet: then an event knows more.
func containerTrouble(c kContainer) string {
	var said []string
	if w := c.State.Waiting; w != nil && w.Reason != "ContainerCreating" && w.Reason != "PodInitializing" {
		said = append(said, clip(w.Reason+after(": ", w.Message), maxFound))
	}
	if t := c.State.Terminated; t != nil && t.ExitCode != 0 {
		said = append(said, ended("it", t))
	}
	if t := c.LastState.Terminated; t != nil && !c.Ready {
		said = append(said, ended("before, it", t))
	}
	if len(said) == 0 {
		return ""
	}
	return "container " + clip(c.Name, 63) + ": " + strings.Join(said, "; ")
}

func ended(who string, t *kTerminated) string {
	how := fmt.Sprintf("ended with exit code %d", t.ExitCode)
	if t.Signal != 0 {
		how = fmt.Sprintf("was ended by signal %d", t.Signal)
	}
	return who + " " + how + after(", ", clip(t.Reason, 64)) + after(": ", lastWords(t.Message))
}

// lastWords are where a program that ends says why: ours in the last line that ends with a code, others in the last one.
func lastWords(s string) string {
	last := ""
	for line := range strings.Lines(strings.TrimSpace(s)) {
		if line = strings.TrimSpace(line); !strings.Contains(last, ", SGN-") || strings.Contains(line, ", SGN-") {
			last = line
		}
	}
	return clip(last, maxFound)
}
