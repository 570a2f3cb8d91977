package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	apiv1 "github.com/signet-ca/signet/api/v1"
)

// maxExcused is how long an excuse may last.
const maxExcused = 30 * 24 * time.Hour

// A whom is of whom an excuse speaks.
type whom struct{ scope, cluster, name string }

func (w whom) String() string { return w.scope + " " + w.name }

// namePart is a name of Kubernetes, or a UID.
var namePart = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)

// uidShape is a UID as Kubernetes draws them.
var uidShape = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// parseWhom takes "node NAME", "pod NAMESPACE/NAME", "pod NAME" with a namespace, and what status prints: "pod/NAMESPACE/NAME".
func parseWhom(args []string, namespace, cluster string) (whom, error) {
	if len(args) == 1 {
		scope, name, ok := strings.Cut(args[0], "/")
		if !ok {
			return whom{}, errors.New("say whom: node NAME, namespace NAME or pod NAMESPACE/NAME")
		}
		args = []string{scope, name}
	}
	if len(args) != 2 {
		return whom{}, errors.New("say whom: node NAME, namespace NAME or pod NAMESPACE/NAME")
	}
	w := whom{scope: args[0], cluster: cluster, name: args[1]}
	switch {
	case w.scope != "node" && w.scope != "namespace" && w.scope != "pod":
		return whom{}, fmt.Errorf("%.70q can be excused by nobody: a node, a namespace or a pod can", w.scope)
	case w.scope != "pod" && namespace != "":
		return whom{}, fmt.Errorf("-n is for a pod, and this is a %s", w.scope)
	case w.scope != "pod":
		if !namePart.MatchString(w.name) {
			return whom{}, fmt.Errorf("%.70q is not the name of a %s", w.name, w.scope)
		}
		return w, nil
	case uidShape.MatchString(w.name) && namespace == "":
		return w, nil
	}
	ns, pod, ok := strings.Cut(w.name, "/")
	if !ok {
		ns, pod = namespace, w.name
	} else if namespace != "" && namespace != ns {
		return whom{}, fmt.Errorf("the pod is in namespace %.70q, and -n says %.70q", ns, namespace)
	}
	if !namePart.MatchString(ns) || !namePart.MatchString(pod) {
		return whom{}, fmt.Errorf("%.70q is no pod: say NAMESPACE/NAME, or its UID", w.name)
	}
	w.name = ns + "/" + pod
	return w, nil
}

// covers reports whether the excuse speaks of b.
func (w whom) covers(b *blockerView) bool {
	if w.cluster != "" && w.cluster != b.Cluster {
		return false
	}
	switch w.scope {
	case "node":
		return w.name == b.Node || w.name == b.NodeUID
	case "namespace":
		return w.name == b.Namespace
	}
	return b.Pod != "" && w.name == b.Namespace+"/"+b.Pod || w.name == b.PodUID
}

type excuseFlags struct {
	namespace, cluster, reason string
	lasting                    time.Duration
}

func (a *app) excuseFlags(c *cobra.Command, f *excuseFlags) {
	c.Args = cobra.RangeArgs(1, 2)
	c.Flags().StringVarP(&f.namespace, "namespace", "n", "", "`NAMESPACE` of the pod")
	c.Flags().StringVar(&f.cluster, "cluster", "", "`ISSUER` of the cluster's tokens; without it, whatever is called that in any cluster")
	c.Flags().StringVar(&f.reason, "reason", "", "why, in your `WORDS`; goes on record")
	c.RegisterFlagCompletionFunc("namespace", a.completeNamespaces)
}

func (a *app) rotateExcuseCommand() *cobra.Command {
	var f excuseFlags
	c := &cobra.Command{
		Use:   "excuse node|namespace|pod NAME",
		Short: "Say that no step waits for a node, a namespace or a pod, for a while",
		Long: "Excuse somebody: no step of a rotation waits for him until the time is over. It outlives reconnects, restarts and the\n" +
			"rotation itself, and is given again to change it. A node's excuse is for its agent and all pods there,\n" +
			"a namespace's for its pods and its copy of the bundle.\n\n" +
			"Where the new root is cross-signed by the old one, who is excused loses nothing. Where it is not, he refuses what is\n" +
			"issued under the new root until he has the bundle: his mTLS connections fail.",
		Example: "  signet rotate excuse node node-7 --reason 'in repair until Monday' --for 3d\n" +
			"  signet rotate excuse pod shop/web-1 --reason 'its Envoy refuses the bundle, ticket 812' --for 12h\n" +
			"  signet rotate excuse pod/shop/web-1 --reason 'as status prints it' --for 12h\n" +
			"  signet rotate excuse namespace batch --reason 'nothing there takes part' --for 30d",
		ValidArgsFunction: a.completeBlockers,
	}
	a.excuseFlags(c, &f)
	c.Flags().Var((*span)(&f.lasting), "for", "how long, a `DURATION` of at most 30d")
	o := outputFlags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		w, err := parseWhom(args, f.namespace, f.cluster)
		switch {
		case err != nil:
			return usageError{err}
		case strings.TrimSpace(f.reason) == "":
			return usageError{errors.New("an excuse needs a --reason: it goes on record, and others will ask")}
		case f.lasting == 0:
			return usageError{errors.New("an excuse needs an end: --for, at most 30d")}
		case f.lasting > maxExcused:
			return usageError{fmt.Errorf("--for %s is more than 30d", f.lasting)}
		}
		if err := checkReason(f.reason); err != nil {
			return err
		}
		d, err := once(a, func(ch *channel) (*rotationDecision, error) {
			resp, err := askRotation(c.Context(), a, ch, ch.ExcuseRotation, &apiv1.ExcuseRotationRequest{Scope: w.scope, Cluster: w.cluster, Name: w.name,
				Reason: f.reason, Lasting: durationpb.New(f.lasting)})
			if err != nil {
				return nil, rotationFailed(err, "")
			}
			d := newDecision("RotationExcuse", w.scope+"/"+w.name, newRotation(resp.GetRotation(), a.now()))
			d.Changed, d.CorrelationID = resp.GetChanged(), resp.GetCorrelationId()
			return d, nil
		})
		if err != nil {
			return err
		}
		return a.print(o, result{object: d, text: func(bool) []block { return []block{d.excused(w)} }})
	}
	return c
}

func (a *app) rotateUnexcuseCommand() *cobra.Command {
	var f excuseFlags
	c := &cobra.Command{
		Use:   "unexcuse node|namespace|pod NAME",
		Short: "Take an excuse back",
		Long: "Take an excuse back, as it was given: by the same name and the same --cluster. A step that is yet to be taken waits\n" +
			"for him again.",
		Example: "  signet rotate unexcuse node node-7 --reason 'repaired'\n" +
			"  signet rotate unexcuse pod shop/web-1",
		ValidArgsFunction: a.completeExcuses,
	}
	a.excuseFlags(c, &f)
	o := outputFlags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		w, err := parseWhom(args, f.namespace, f.cluster)
		if err != nil {
			return usageError{err}
		}
		if err := checkReason(f.reason); err != nil {
			return err
		}
		d, err := once(a, func(ch *channel) (*rotationDecision, error) {
			resp, err := askRotation(c.Context(), a, ch, ch.UnexcuseRotation, &apiv1.UnexcuseRotationRequest{Scope: w.scope, Cluster: w.cluster, Name: w.name, Reason: f.reason})
			if err != nil {
				return nil, rotationFailed(err, "")
			}
			d := newDecision("RotationUnexcuse", w.scope+"/"+w.name, newRotation(resp.GetRotation(), a.now()))
			d.Changed, d.CorrelationID = resp.GetChanged(), resp.GetCorrelationId()
			return d, nil
		})
		if err != nil {
			return err
		}
		return a.print(o, result{object: d, text: func(bool) []block { return []block{d.unexcused(w)} }})
	}
	return c
}

// excused says what an excuse does to the rotation that is under way, and to whom.
func (d *rotationDecision) excused(w whom) block {
	v := d.Rotation
	pairs := []pair{v.about()}
	said := "it was excused like that already"
	for _, e := range v.Excuses {
		if e.Scope == w.scope && e.Name == w.name && e.Cluster == w.cluster {
			said = w.String() + ", until " + dash(e.Until) + " (" + comes(e.until, v.now) + "), by " + e.By + after(": ", e.Reason)
		}
	}
	pairs = append(pairs, pair{"Excused", said})
	covered := 0
	for _, g := range v.Gates {
		for _, b := range g.Blockers {
			if b.Pass == "excused" && w.covers(b) {
				covered++
			}
		}
	}
	switch {
	case v.Operation == nil:
		pairs = append(pairs, pair{"Now", "no rotation is under way; it holds for one that begins"})
	case covered == 0:
		pairs = append(pairs, pair{"Now", "nobody of whom it speaks is waited for at this moment"}, pair{"State", v.stateText()})
	default:
		loses := "nothing: the new root is cross-signed, and what it issues is verified with the old one"
		if v.Forecast != nil && !v.Forecast.CrossSigned {
			loses = "mTLS with whoever has an SVID under the new root, until it has the bundle: that root is not cross-signed"
		}
		pairs = append(pairs, pair{"Now", plural(covered, "time") + " passed over by it"}, pair{"Loses", loses}, pair{"State", v.stateText()})
	}
	return block{pairs: append(pairs, known(pair{"On record", d.CorrelationID})...)}
}

func (d *rotationDecision) unexcused(w whom) block {
	v := d.Rotation
	said := w.String() + " is waited for again"
	if !d.Changed {
		said = w.String() + " was not excused"
	}
	pairs := []pair{v.about(), {"Excuse", said}}
	if v.Operation != nil {
		pairs = append(pairs, pair{"State", v.stateText()})
	}
	return block{pairs: append(pairs, known(pair{"On record", d.CorrelationID})...)}
}

// completeOperation offers the operation that is under way.
func (a *app) completeOperation(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return complete(a, c, a.rotation, func(v *rotationView) (words []string) {
		if v.Operation != nil && operationShape.MatchString(v.Operation.ID) {
			words = append(words, v.Operation.ID)
		}
		return words
	})
}

var scopes = []string{"node", "namespace", "pod"}

// completeBlockers offers those who are waited for.
func (a *app) completeBlockers(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return scopes, cobra.ShellCompDirectiveNoFileComp
	case 1:
		return complete(a, c, a.rotation, func(v *rotationView) (words []string) {
			for _, g := range v.Gates {
				for _, b := range g.Blockers {
					words = append(words, b.inScope(args[0]))
				}
			}
			return words
		})
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// inScope is what excuses b in that scope; empty: nothing does.
func (b *blockerView) inScope(scope string) string {
	switch {
	case scope == "node":
		return b.Node
	case scope == "namespace":
		return b.Namespace
	case scope == "pod" && b.Pod != "":
		return b.Namespace + "/" + b.Pod
	}
	return ""
}

// completeExcuses offers what is excused.
func (a *app) completeExcuses(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return scopes, cobra.ShellCompDirectiveNoFileComp
	case 1:
		return complete(a, c, func(ctx context.Context, ch *channel) (*rotationView, error) { return a.rotation(ctx, ch) }, func(v *rotationView) (words []string) {
			for _, e := range v.Excuses {
				if e.Scope == args[0] {
					words = append(words, e.Name)
				}
			}
			return words
		})
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}
