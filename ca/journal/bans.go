package journal

import (
	"cmp"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/signet-ca/signet/api"
)

// bansSchema is the first that has bans and ticket keys. A record is raised no further than what it holds needs, so that an
// earlier build goes on with it.
const bansSchema = 2

// TicketKey is one key of renewal tickets.
type TicketKey struct {
	ID     string    `json:"id"` // 16 lower-case hex digits, drawn at random
	At     time.Time `json:"at"`
	Sealed []byte    `json:"sealed"` // by ca.Sealer
}

// Ban is a node whose agent is refused until the ban is taken back.
type Ban struct {
	Cluster string    `json:"cluster"` // issuer of its tokens
	NodeUID string    `json:"nodeUID"`
	Node    string    `json:"node,omitempty"` // its name, for people
	At      time.Time `json:"at"`
	By      string    `json:"by"` // who decided, as the CA knew him
	Reason  string    `json:"reason,omitempty"`
	// ValidUntil is when the last SVID expires that the node can have had at that moment.
	ValidUntil time.Time `json:"validUntil,omitzero"`
}

// Banned returns the ban of a node.
func (j Journal) Banned(cluster, nodeUID string) (Ban, bool) {
	i, ok := slices.BinarySearchFunc(j.Bans, Ban{Cluster: cluster, NodeUID: nodeUID}, compareBans)
	if !ok {
		return Ban{}, false
	}
	return j.Bans[i], true
}

func compareBans(a, b Ban) int {
	return cmp.Or(strings.Compare(a.Cluster, b.Cluster), strings.Compare(a.NodeUID, b.NodeUID))
}

// WithBan returns the record with this ban, in place of one of the same node; StateFull where there is no room for it.
func (j Journal) WithBan(b Ban) (Journal, error) {
	if err := b.validate(); err != nil {
		return Journal{}, err
	}
	i, ok := slices.BinarySearchFunc(j.Bans, b, compareBans)
	j.Schema, j.Bans = max(j.Schema, bansSchema), slices.Clone(j.Bans)
	if ok {
		j.Bans[i] = b
	} else {
		j.Bans = slices.Insert(j.Bans, i, b)
	}
	stored, err := json.Marshal(j.Bans)
	if err != nil {
		return Journal{}, corrupt("ban of node %.64q: %v", b.NodeUID, err)
	}
	if len(j.Bans) > MaxBans || len(stored) > maxBanBytes {
		return Journal{}, api.E(api.StateFull, "the record holds %d bans, and there is no room for one more", len(j.Bans)-1)
	}
	return j, j.Validate()
}

// WithoutBan returns the record without the ban of a node.
func (j Journal) WithoutBan(cluster, nodeUID string) Journal {
	j.Schema = max(j.Schema, bansSchema)
	j.Bans = slices.DeleteFunc(slices.Clone(j.Bans), func(b Ban) bool { return b.Cluster == cluster && b.NodeUID == nodeUID })
	if len(j.Bans) == 0 {
		j.Bans = nil // as it is read back
	}
	return j
}

// WithTicketKey returns the record with a new first ticket key. The oldest goes where there are too many.
func (j Journal) WithTicketKey(k TicketKey) (Journal, error) {
	j.Schema = max(j.Schema, bansSchema)
	j.TicketKeys = slices.Insert(slices.Clone(j.TicketKeys), 0, k)
	j.TicketKeys = j.TicketKeys[:min(len(j.TicketKeys), MaxTicketKeys)]
	return j, j.Validate()
}

// validateRest checks what came with schema 2. A record that has it and says that it is older was written by nobody.
func (j Journal) validateRest() error {
	if j.Schema < 2 && len(j.TicketKeys)+len(j.Bans) > 0 {
		return corrupt("schema %d with ticket keys or bans", j.Schema)
	}
	if len(j.TicketKeys) > MaxTicketKeys || len(j.Bans) > MaxBans {
		return corrupt("%d ticket keys, %d bans", len(j.TicketKeys), len(j.Bans))
	}
	for i, k := range j.TicketKeys {
		if b, err := hex.DecodeString(k.ID); err != nil || len(b) != 8 || hex.EncodeToString(b) != k.ID || k.At.IsZero() || len(k.Sealed) == 0 {
			return corrupt("ticket key %.32q", k.ID)
		}
		if slices.ContainsFunc(j.TicketKeys[:i], func(o TicketKey) bool { return o.ID == k.ID }) {
			return corrupt("ticket key %s is there twice", k.ID)
		}
	}
	for i, b := range j.Bans {
		if err := b.validate(); err != nil {
			return err
		}
		if i > 0 && compareBans(j.Bans[i-1], b) >= 0 {
			return corrupt("the ban of node %.64q is out of order", b.NodeUID)
		}
	}
	return nil
}

// validate checks one ban. Text that is no UTF-8 would be another one once it is read back.
func (b Ban) validate() error {
	if b.Cluster == "" || b.NodeUID == "" || b.At.IsZero() || b.By == "" ||
		len(b.Cluster) > maxCluster || len(b.NodeUID) > maxName || len(b.Node) > maxName || len(b.By) > MaxBanText || len(b.Reason) > MaxBanText {
		return corrupt("ban of node %.64q", b.NodeUID)
	}
	for _, text := range []string{b.Cluster, b.NodeUID, b.Node, b.By, b.Reason} {
		if !utf8.ValidString(text) {
			return corrupt("ban of node %.64q", b.NodeUID)
		}
	}
	return nil
}
