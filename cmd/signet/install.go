package main

import (
	"fmt"
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

"signet uninstall" removes it: first the pods that have the volume, then the agents, since without them those would
hang in Terminating.`,
		Example: `  signet install | kubectl apply -f -
  signet install --trust-domain prod.example.org --image-repository registry.example.org/signet | kubectl apply -f -
  signet install | kubectl diff -f -     # what an upgrade would change
  signet check --wait                    # once it is applied: is all well?`,
		Args: noArgs,
	}
	var o deploy.Options
	f := c.Flags()
	f.StringVar(&o.TrustDomain, "trust-domain", d.TrustDomain, "`NAME` of the trust domain, part of every SPIFFE ID")
	f.StringVar(&o.Issuer, "issuer", d.Issuer, "`URL` of the cluster's tokens, as in kubectl get --raw /.well-known/openid-configuration")
	f.StringVar(&o.Repository, "image-repository", d.Repository, "`PREFIX` of the images' names, as in PREFIX/signet-ca")
	f.StringVar(&o.Tag, "image-tag", imageTag(a.version), "`TAG` of the images")
	f.StringVar(&o.PullPolicy, "image-pull-policy", d.PullPolicy, "`POLICY`: Always, IfNotPresent or Never")
	f.StringVar(&o.KubeletDir, "kubelet-dir", d.KubeletDir, "`FOLDER` of kubelet on the nodes, its --root-dir")
	c.RegisterFlagCompletionFunc("image-pull-policy", cobra.FixedCompletions([]string{"Always", "IfNotPresent", "Never"}, cobra.ShellCompDirectiveNoFileComp))
	c.RunE = func(*cobra.Command, []string) error {
		for name, value := range map[string]string{
			"trust-domain": o.TrustDomain, "issuer": o.Issuer, "image-repository": o.Repository, "image-tag": o.Tag,
			"image-pull-policy": o.PullPolicy, "kubelet-dir": o.KubeletDir,
		} {
			if value == "" { // of a variable that is not set, probably
				return usageError{fmt.Errorf("--%s is empty", name)}
			}
		}
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
