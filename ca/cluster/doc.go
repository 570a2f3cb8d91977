// Package cluster is Kubernetes as the CA sees it: which pods live, and where the bundle is shown to those who need it for
// their first trust.
//
// What it says is only ever used to refuse: a pod that it does not know gets nothing, but a pod that it knows gets
// nothing either without a token of its own. One thing more: a rotation does not wait for an agent that is away once its node is gone.
package cluster
