package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/signet-ca/signet/internal/kube"
)

// annotationSchema says on the published bundle which schema the CA's record has, and on the CA's StatefulSet which one that
// version reads.
const annotationSchema = kube.OurPrefix + "record-schema"

// An installedPart is what of a workload says of which version it is.
type installedPart struct {
	Metadata kMeta `json:"metadata"`
	Spec     struct {
		Template struct {
			Spec struct {
				Containers []struct {
					Image string `json:"image"`
				} `json:"containers"`
			} `json:"spec"`
		} `json:"template"`
	} `json:"spec"`
}

// version is the tag of the image; "" where it has none, or is named by its digest.
func (p *installedPart) version() string {
	if len(p.Spec.Template.Spec.Containers) == 0 {
		return ""
	}
	image := p.Spec.Template.Spec.Containers[0].Image
	if strings.Contains(image, "@") {
		return ""
	}
	_, tag, _ := strings.Cut(image[strings.LastIndex(image, "/")+1:], ":")
	return clip(tag, 128)
}

// checkUpgrade looks whether the CA that is installed reads the record that is there, and whether the agents are of its version.
func (i *checkup) checkUpgrade(ctx context.Context) {
	var ca, agents installedPart
	for _, p := range []struct {
		resource, name string
		into           *installedPart
	}{{"statefulsets", caName, &ca}, {"daemonsets", agentName, &agents}} {
		if err := i.get(ctx, in("apps/v1", i.kf.namespace, p.resource, p.name), p.into); err != nil {
			return // checkAuthority and checkAgents have told
		}
	}
	var bundle kObject
	if err := i.get(ctx, in("v1", i.kf.namespace, "configmaps", bundleName), &bundle); err != nil && !errors.Is(err, kube.ErrNotFound) {
		return // checkBundle tells
	}
	object := namespaced(i.kf.namespace, "statefulset", caName)
	reads, err := strconv.Atoi(ca.Metadata.Annotations[annotationSchema])
	if err != nil {
		reads = 1 // as of those that did not say it
	}
	record, err := strconv.Atoi(bundle.Metadata.Annotations[annotationSchema])
	if known := err == nil; known && record > reads {
		i.add("upgrade", resultBad, object,
			fmt.Sprintf("the CA's record has schema %d, and this version%s reads up to %d: it does not start (STATE_NEWER). What workloads hold is served until it expires", record, after(" ", ca.version()), reads),
			"install the newer version again, or restore the backup made before the upgrade: docs/upgrades.md")
		return
	}
	switch of, other := ca.version(), agents.version(); {
	case of == "" || other == "":
		i.good("upgrade", object, "the CA reads its record; images are named by digest, so versions are not compared")
	case of != other:
		i.add("upgrade", resultWarning, object, fmt.Sprintf("the CA is of version %s and the agents are of %s: either may be one behind, not for long", of, other), i.install()).settled = true
	default:
		i.good("upgrade", object, "CA and agents are of version %s, and the CA reads its record", of)
	}
}
