package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

func (a *app) svidCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "svid",
		Short: "SVIDs: which pod holds which, and whether a certificate is a correct one",
		Example: "  signet svid list -n shop\n" +
			"  signet svid get shop/web-1\n" +
			"  signet svid inspect localhost:8443",
	}
	c.AddCommand(a.svidListCommand(), a.svidGetCommand(), a.svidInspectCommand())
	return c
}

// An svidView is one SVID as an agent says that it holds it.
type svidView struct {
	header
	SPIFFEID    string       `json:"spiffeID"`
	Namespace   string       `json:"namespace,omitempty"`
	Pod         string       `json:"pod,omitempty"`
	PodUID      string       `json:"podUID,omitempty"`
	Node        string       `json:"node,omitempty"`
	NodeUID     string       `json:"nodeUID,omitempty"`
	Key         string       `json:"key"` // which of the agent's holdings it is
	Serial      string       `json:"serial"`
	IssuerKeyID string       `json:"issuerKeyID,omitempty"`
	NotBefore   string       `json:"notBefore,omitempty"`
	NotAfter    string       `json:"notAfter,omitempty"`
	RenewAt     string       `json:"renewAt,omitempty"`
	ReportedAt  string       `json:"reportedAt,omitempty"`
	LastError   string       `json:"lastError,omitempty"` // reason of the last failed renewal
	State       string       `json:"state"`               // Valid, Overdue, Expired or Unknown
	Ack         ackView      `json:"ack"`
	Streams     []streamView `json:"streams"`

	notAfter, renewAt time.Time
}

// An svidList is the answer of svid list and svid get.
type svidList struct {
	header
	Items []*svidView `json:"items"`
}

// An ackView sums up the streams of one SVID.
type ackView struct {
	State   ackState `json:"state"`
	Acked   int      `json:"acked"`   // streams that acknowledged all that was pushed to them
	Streams int      `json:"streams"` // streams there are
}

// A streamView is one stream and what it has acknowledged.
type streamView struct {
	ID               string   `json:"id"`
	Proxy            string   `json:"proxy,omitempty"` // what the client calls itself; never trusted
	Protocol         string   `json:"protocol,omitempty"`
	Names            []string `json:"names"`
	State            ackState `json:"state"`
	WantsBundle      bool     `json:"wantsBundle"`
	AckedSerial      string   `json:"ackedSerial,omitempty"`
	AckedGeneration  string   `json:"ackedGeneration,omitempty"`  // EPOCH.NUMBER
	PushedGeneration string   `json:"pushedGeneration,omitempty"` // EPOCH.NUMBER
	PushedSerial     string   `json:"pushedSerial,omitempty"`     // of the Workload API, which acknowledges nothing
	AckedHash        string   `json:"ackedHash,omitempty"`
	Nack             string   `json:"nack,omitempty"` // its last rejection, as it said it
	Acks             uint64   `json:"acks"`
	Nacks            uint64   `json:"nacks"`
}

// The states of an SVID.
const (
	stateValid   = "Valid"
	stateOverdue = "Overdue" // its renewal was due more than overdueAfter ago
	stateExpired = "Expired"
	stateUnknown = "Unknown" // the agent does not say until when it is valid
)

// overdueAfter is how late a renewal may be before it is worth a word: a retry or two.
const overdueAfter = time.Minute

func newSVIDView(nh *apiv1.NodeHolding, now time.Time) *svidView {
	h := nh.GetHolding()
	v := &svidView{
		header:      newHeader("SVID", svidName(h)),
		SPIFFEID:    h.GetSpiffeId(),
		Namespace:   h.GetNamespace(),
		Pod:         h.GetPodName(),
		PodUID:      h.GetPodUid(),
		Node:        nh.GetNode(),
		NodeUID:     nh.GetNodeUid(),
		Key:         h.GetKey(),
		Serial:      h.GetSerial(),
		IssuerKeyID: h.GetIssuerKeyId(),
		NotBefore:   stamp(timeOf(h.GetNotBefore())),
		ReportedAt:  stamp(timeOf(nh.GetReportedAt())),
		LastError:   h.GetLastError(),
		State:       stateValid,
		Streams:     []streamView{},
		notAfter:    timeOf(h.GetNotAfter()),
		renewAt:     timeOf(h.GetRenewAt()),
	}
	v.NotAfter, v.RenewAt = stamp(v.notAfter), stamp(v.renewAt)
	switch {
	case v.notAfter.IsZero():
		v.State = stateUnknown
	case now.After(v.notAfter):
		v.State = stateExpired
	case !v.renewAt.IsZero() && now.Sub(v.renewAt) > overdueAfter:
		v.State = stateOverdue
	}
	for _, s := range h.GetStreams() {
		v.Streams = append(v.Streams, newStreamView(h, s))
	}
	v.Ack = sumAcks(v.Streams)
	return v
}

// svidName is what `svid get` takes: NAMESPACE/POD, or the SPIFFE ID of what belongs to no pod.
func svidName(h *apiv1.Holding) string {
	if h.GetPodName() == "" {
		return h.GetSpiffeId()
	}
	return h.GetNamespace() + "/" + h.GetPodName()
}

func newSVIDList(hs []*apiv1.NodeHolding, now time.Time) *svidList {
	l := &svidList{header: newHeader("SVIDList", ""), Items: []*svidView{}}
	for _, h := range hs {
		l.Items = append(l.Items, newSVIDView(h, now))
	}
	return l
}

func newStreamView(h *apiv1.Holding, s *apiv1.Stream) streamView {
	v := streamView{
		ID:          fmt.Sprint(s.GetId()),
		Proxy:       s.GetProxy(),
		Protocol:    s.GetProtocol(),
		Names:       append([]string{}, s.GetNames()...),
		State:       ackOf(h.GetSerial(), s),
		WantsBundle: s.GetWantsBundle(),
		AckedSerial: s.GetAckedSerial(),
		Nack:        s.GetNack(),
		Acks:        s.GetAcks(),
		Nacks:       s.GetNacks(),
	}
	if s.GetWantsBundle() {
		v.AckedGeneration = api.FromSequence(s.GetAckedGeneration()).String()
		v.PushedGeneration = api.FromSequence(s.GetPushedGeneration()).String()
		v.AckedHash = fmt.Sprintf("%x", s.GetAckedHash())
	}
	if s.GetProtocol() == protocolWorkloadAPI {
		v.PushedSerial = s.GetPushedSerial()
		v.PushedGeneration = api.FromSequence(s.GetPushedGeneration()).String()
	}
	return v
}

// An ackState tells what a stream has said to what was pushed to it.
type ackState string

// The states of a stream, and of all streams of an SVID together.
const (
	ackNone ackState = "NONE" // there is no stream
	ackGood ackState = "ACK"  // it acknowledged the newest of all that it subscribed to
	ackSent ackState = "SENT" // it was sent the newest and cannot answer: the Workload API has no acknowledgement
	ackWait ackState = "WAIT" // it has not answered yet, or was not sent the newest
	ackBad  ackState = "NACK" // it rejected something and has not taken it back
)

// protocolWorkloadAPI is what agents call a stream of the Workload API.
const protocolWorkloadAPI = "workload-api"

// ackOf judges one stream of the SVID with this serial. A stream owes an acknowledgement for each kind of secret that
// it subscribed to: the SVID, the bundle, or both. One of the Workload API owes none, whatever it was sent.
func ackOf(serial string, s *apiv1.Stream) ackState {
	if s.GetProtocol() == protocolWorkloadAPI {
		if s.GetPushedGeneration() == 0 || s.GetPushedSerial() != "" && s.GetPushedSerial() != serial {
			return ackWait
		}
		return ackSent
	}
	wantsSVID := slices.ContainsFunc(s.GetNames(), func(name string) bool { return !isBundleName(name) })
	switch {
	case s.GetNack() != "":
		return ackBad
	case wantsSVID && s.GetAckedSerial() != serial:
		return ackWait
	case s.GetWantsBundle() && s.GetAckedGeneration() != s.GetPushedGeneration():
		return ackWait
	case s.GetAcks() == 0:
		return ackWait
	}
	return ackGood
}

// isBundleName reports whether an SDS name is that of a trust bundle: Envoy's two, or a trust domain's ID.
func isBundleName(name string) bool {
	if name == "ROOTCA" || name == "ALL" {
		return true
	}
	id, err := spiffeid.FromString(name)
	return err == nil && id.Path() == ""
}

func sumAcks(streams []streamView) ackView {
	sum := ackView{State: ackNone, Streams: len(streams)}
	for _, s := range streams {
		switch {
		case s.State == ackBad, s.State == ackWait && sum.State != ackBad:
			sum.State = s.State
		case s.State == ackSent && (sum.State == ackNone || sum.State == ackGood):
			sum.State = ackSent
		case s.State == ackGood:
			sum.Acked++
			if sum.State == ackNone {
				sum.State = ackGood
			}
		}
	}
	return sum
}

// String is "ACK 2/2", "SENT 0/1", "WAIT 1/2", "NACK 0/1", or "-" without streams.
func (v ackView) String() string {
	if v.State == ackNone {
		return "-"
	}
	return fmt.Sprintf("%s %d/%d", v.State, v.Acked, v.Streams)
}

// problems lists what is wrong with v; empty when it is as it should be.
func (v *svidView) problems() []string {
	var p []string
	if v.State != stateValid {
		p = append(p, strings.ToLower(v.State))
	}
	if v.LastError != "" {
		p = append(p, "renewal fails: "+v.LastError)
	}
	for _, s := range v.Streams {
		if s.State == ackBad {
			p = append(p, fmt.Sprintf("rejected by %s: %s", dash(s.Proxy), s.Nack))
		}
	}
	return p
}

func (v *svidView) expires(now time.Time) string { return until(v.notAfter, now, "EXPIRED") }

func (v *svidView) renews(now time.Time) string {
	if late := now.Sub(v.renewAt); !v.renewAt.IsZero() && late >= 0 && late <= overdueAfter {
		return "now"
	}
	return until(v.renewAt, now, "OVERDUE")
}
