package main

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// A versionView tells what this binary is, and what the CA says of itself.
type versionView struct {
	header
	Client clientVersion  `json:"client"`
	Server *serverVersion `json:"server,omitempty"`
}

type clientVersion struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"` // of the source
	Go       string `json:"go"`
	Platform string `json:"platform"`
	Protocol int    `json:"protocol"` // of api/v1
}

type serverVersion struct {
	Version     string   `json:"version"`
	TrustDomain string   `json:"trustDomain"`
	Replica     string   `json:"replica"`
	Protocols   string   `json:"protocols,omitempty"` // that it speaks with agents: "1", or "1 to 2"
	Generation  string   `json:"generation"`          // EPOCH.NUMBER
	StartedAt   string   `json:"startedAt,omitempty"`
	Agents      uint32   `json:"agents"`
	Issued      uint64   `json:"issued"`
	Refused     uint64   `json:"refused"`
	NotReady    []string `json:"notReady"`
	Caller      string   `json:"caller,omitempty"` // who asked, as the CA knows him
	Roles       []string `json:"roles,omitempty"`  // that he has there

	Upstream *upstreamView `json:"upstream,omitempty"`
}

// An upstreamView is whether the CA could have another intermediate signed, and how long it can go on without.
type upstreamView struct {
	Type                 string   `json:"type,omitempty"` // of the driver: selfsigned, disk
	Healthy              bool     `json:"healthy"`
	Reason               string   `json:"reason,omitempty"` // why not, and its code
	Code                 string   `json:"code,omitempty"`
	Detail               string   `json:"detail,omitempty"`
	Since                string   `json:"since,omitempty"`     // since when it is so
	ProbedAt             string   `json:"probedAt,omitempty"`  // empty: not yet
	Announced            []string `json:"announced,omitempty"` // ids of its roots that are not in the record
	IntermediateNotAfter string   `json:"intermediateNotAfter,omitempty"`
	MintBudget           uint32   `json:"mintBudget,omitempty"` // intermediates that may be asked for in an hour; 0: the CA does not say
	MintLeft             *uint32  `json:"mintLeft,omitempty"`   // how many of them still

	intermediateNotAfter time.Time
}

func newUpstream(in *apiv1.UpstreamStatus) *upstreamView {
	if in == nil {
		return nil
	}
	v := &upstreamView{
		Type: in.GetKind(), Healthy: in.GetHealthy(), Reason: in.GetReason(), Detail: in.GetDetail(), Since: stamp(timeOf(in.GetSince())),
		ProbedAt: stamp(timeOf(in.GetProbedAt())), Announced: slices.Clone(in.GetAnnounced()), IntermediateNotAfter: stamp(timeOf(in.GetIntermediateNotAfter())),
	}
	if v.MintBudget = in.GetMintBudget(); v.MintBudget > 0 {
		v.MintLeft = new(in.GetMintLeft())
	}
	v.intermediateNotAfter = timeOf(in.GetIntermediateNotAfter())
	if p, ok := findPage(v.Reason); ok && v.Reason != "" {
		v.Code = p.Code()
	}
	return v
}

// String says how it is, for people.
func (v *upstreamView) String() string {
	if v == nil {
		return ""
	}
	s := strings.TrimSpace(v.Type + " would sign")
	switch {
	case v.ProbedAt == "":
		s = v.Type + " was not asked yet"
	case !v.Healthy:
		s = strings.TrimSpace(v.Type+" WOULD NOT SIGN since "+v.Since) + after(": ", strings.TrimSpace(v.Code+" "+v.Reason)) + after(": ", v.Detail)
	}
	if n := len(v.Announced); n > 0 {
		s += "; ANNOUNCES " + plural(n, "root") + " that no rotation has taken up: " + strings.Join(shorts(v.Announced), ", ")
	}
	return s + after("; SVIDs are issued without it until ", v.IntermediateNotAfter)
}

func (a *app) versionCommand() *cobra.Command {
	var server bool
	c := &cobra.Command{
		Use:   "version",
		Short: "Show the version of this binary, and with --server that of the CA",
		Example: "  signet version\n" +
			"  signet version --server   # and what the CA says of itself",
		Args: noArgs,
	}
	o := outputFlags(c)
	c.Flags().BoolVar(&server, "server", false, "also ask the CA")
	c.RunE = func(c *cobra.Command, _ []string) error {
		v := &versionView{header: newHeader("Version", "signet"), Client: a.clientVersion()}
		var failed error
		if server {
			st, err := once(a, func(ch *channel) (*apiv1.GetStatusResponse, error) {
				return ask(c.Context(), a, ch, ch.GetStatus, &apiv1.GetStatusRequest{})
			})
			if failed = err; err == nil {
				v.Server = newServerVersion(st)
			}
		}
		if err := a.print(o, result{object: v, text: func(bool) []block { return describeVersion(v) }}); err != nil {
			return err
		}
		return failed
	}
	return c
}

func (a *app) clientVersion() clientVersion {
	v := clientVersion{Version: a.version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH, Protocol: api.Protocol}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		v.Version = cmp.Or(v.Version, "unknown")
		return v
	}
	v.Version = cmp.Or(v.Version, info.Main.Version, "unknown")
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			v.Revision = s.Value + v.Revision
		case s.Key == "vcs.modified" && s.Value == "true":
			v.Revision += "-dirty"
		}
	}
	return v
}

func newServerVersion(st *apiv1.GetStatusResponse) *serverVersion {
	protocols := ""
	if st.GetProtocol() != 0 {
		protocols = api.ProtocolsOf(st.GetProtocol(), st.GetOldestProtocol()).String()
	}
	return &serverVersion{
		Version:     st.GetVersion(),
		Protocols:   protocols,
		TrustDomain: st.GetTrustDomain(),
		Replica:     st.GetReplica(),
		Generation:  api.Generation{Epoch: st.GetEpoch(), Number: st.GetNumber()}.String(),
		StartedAt:   stamp(timeOf(st.GetStartedAt())),
		Agents:      st.GetAgents(),
		Issued:      st.GetIssued(),
		Refused:     st.GetRefused(),
		NotReady:    append([]string{}, st.GetNotReady()...),
		Caller:      st.GetCaller(),
		Roles:       st.GetRoles(),
		Upstream:    newUpstream(st.GetUpstream()),
	}
}

func describeVersion(v *versionView) []block {
	own := []pair{{"signet", v.Client.Version}}
	if v.Client.Revision != "" {
		own = append(own, pair{"revision", v.Client.Revision})
	}
	own = append(own, pair{"go", v.Client.Go + " " + v.Client.Platform}, pair{"protocol", fmt.Sprint(v.Client.Protocol)})
	blocks := []block{{pairs: own}}
	if s := v.Server; s != nil {
		ready := "yes"
		if len(s.NotReady) > 0 {
			ready = "NO: " + strings.Join(s.NotReady, "; ")
		}
		you := s.Caller + after(", with the roles ", strings.Join(s.Roles, ", "))
		blocks = append(blocks, block{pairs: known(
			pair{"signet-ca", s.Version},
			pair{"protocols", s.Protocols},
			pair{"trust domain", s.TrustDomain},
			pair{"generation", s.Generation},
			pair{"replica", s.Replica},
			pair{"started", s.StartedAt},
			pair{"agents", fmt.Sprint(s.Agents)},
			pair{"issued", fmt.Sprint(s.Issued)},
			pair{"refused", fmt.Sprint(s.Refused)},
			pair{"ready", ready},
			pair{"upstream", s.Upstream.String()},
			pair{"you are", you},
		)})
	}
	return blocks
}
