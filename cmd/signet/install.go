package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/deploy"
)

func (a *app) installCommand() *cobra.Command {
	d := deploy.Defaults()
	c := &cobra.Command{
		Use:   "install",
		Short: "Print the manifests that install Signet in a Kubernetes cluster",
		Long: `Print the manifests that install Signet in a Kubernetes cluster, for kubectl: the CA and the agents in namespace
` + deploy.Namespace + `, the volume that gives each pod its socket, and the permissions that they need. It speaks to no
cluster. It is the Helm chart's default rendering; for all else that can be set, use the chart.

The same line again, with a newer signet, upgrades. The trust domain cannot be changed: a renamed one is a new one.

To remove Signet, first delete every pod that has the volume: without the agent the others would hang in Terminating.
Then pipe the same manifests into "kubectl delete -f -". That deletes the namespace with the CA's root in it; no SVID
can be renewed from then on.`,
		Example: `  signet install | kubectl apply -f -
  signet install --trust-domain prod.example.org --image-repository registry.example.org/signet | kubectl apply -f -
  signet install | kubectl diff -f -     # what an upgrade would change`,
		Args: noArgs,
	}
	var o deploy.Options
	f := c.Flags()
	f.StringVar(&o.TrustDomain, "trust-domain", d.TrustDomain, "`NAME` of the trust domain, part of every SPIFFE ID")
	f.StringVar(&o.Issuer, "issuer", d.Issuer, "`URL` that the cluster's tokens name as their issuer")
	f.StringVar(&o.Repository, "image-repository", d.Repository, "`PREFIX` of the images' names, as in PREFIX/signet-ca")
	f.StringVar(&o.Tag, "image-tag", imageTag(a.version), "`TAG` of the images")
	f.StringVar(&o.PullPolicy, "image-pull-policy", d.PullPolicy, "`POLICY`: Always, IfNotPresent or Never")
	f.StringVar(&o.KubeletDir, "kubelet-dir", d.KubeletDir, "`FOLDER` of kubelet on the nodes, its --root-dir")
	c.RegisterFlagCompletionFunc("image-pull-policy", cobra.FixedCompletions([]string{"Always", "IfNotPresent", "Never"}, cobra.ShellCompDirectiveNoFileComp))
	c.RunE = func(*cobra.Command, []string) error {
		manifests, err := deploy.Install(o)
		if err != nil {
			return usageError{err}
		}
		_, err = a.stdout.Write(manifests)
		return err
	}
	return c
}

// imageTag is the tag of the images that were made with this binary: tags have no plus sign.
func imageTag(version string) string {
	if version == "" {
		return deploy.Defaults().Tag
	}
	return strings.ReplaceAll(version, "+", "_")
}
