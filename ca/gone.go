package ca

import (
	"slices"
	"time"

	"github.com/signet-ca/signet/ca/journal"
)

// NodeWatcher is a Directory that can tell that a node is no more. Implementations are in ca/cluster.
type NodeWatcher interface {
	Directory
	// NodeGone reports whether no node of that UID is in the cluster, and up to when everything there is known, from memory: false where
	// that is not known now. It is asked about nodes that were there once.
	NodeGone(n NodeID) (upTo time.Time, gone bool)
}

// A rotation waits for an agent that is away for as long as an SVID of its node may be good, unless the node is gone. That takes two
// witnesses. That the session is over this CA has seen itself, and goneAfter is left for the next one: whoever deletes the object of a
// node that lives makes nobody deaf by it, for an open session counts, whatever the cluster says, and a kubelet that registers its
// machine anew has its agent come back meanwhile, under the UID that the node has then. That the node is gone says the cluster, by
// whose word every pod and node is attested: seen in full after all of that, and not by a watch that is cut. With the node goes what was
// attested on it: nothing of it is renewed, its agent gets no session, and the cluster ends its pods.
//
// Nothing that is valid is refused for it: a root is removed when the last SVID under it has expired, wherever that is, and in an
// emergency whoever is away is passed over soon anyway.

const (
	goneAfter = 15 * time.Second // from the end of a session, or this process's start, to what the cluster has to have been seen after
	goneLook  = 2 * time.Second  // between two looks at a rotation while somebody is away whose node may go
)

// gone reports whether an agent without a session is one of a node that is no more.
func (ca *CA) gone(k nodeKey, a journal.Agent) bool {
	w, ok := ca.cfg.Directory.(NodeWatcher)
	if !ok {
		return false
	}
	upTo, gone := w.NodeGone(NodeID{Issuer: k.cluster, UID: k.uid, Name: a.Node})
	return gone && !upTo.Before(a.Seen.Add(goneAfter))
}

// lookForGone is wait, or less where somebody who is away may be found to be gone before: the directory wakes nobody.
func (ca *CA) lookForGone(wait time.Duration, acks journal.Acks) time.Duration {
	if _, ok := ca.cfg.Directory.(NodeWatcher); ok && slices.ContainsFunc(acks.Agents, func(a journal.Agent) bool { return !a.Connected }) {
		return min(wait, goneLook)
	}
	return wait
}
