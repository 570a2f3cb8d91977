package api

// The reasons of this build. The text is what `signet explain` prints; docs/reasons.md is made from it.
const (
	// TokenMissing: no token came with the request.
	TokenMissing Reason = "TOKEN_MISSING"
	// TokenTooLarge: the token is too large.
	TokenTooLarge Reason = "TOKEN_TOO_LARGE"
	// TokenMalformed: the token is not a ServiceAccount token.
	TokenMalformed Reason = "TOKEN_MALFORMED"
	// TokenAmbiguous: more than one token came with the request.
	TokenAmbiguous Reason = "TOKEN_AMBIGUOUS"
	// TokenSignature: the token's signature does not verify.
	TokenSignature Reason = "TOKEN_SIGNATURE"
	// TokenAudience: the token is for another audience.
	TokenAudience Reason = "TOKEN_AUDIENCE"
	// TokenAudienceNotExclusive: the token has more than one audience.
	TokenAudienceNotExclusive Reason = "TOKEN_AUDIENCE_NOT_EXCLUSIVE"
	// TokenExpired: the token has expired.
	TokenExpired Reason = "TOKEN_EXPIRED"
	// TokenNotYetValid: the token is not valid yet.
	TokenNotYetValid Reason = "TOKEN_NOT_YET_VALID"
	// TokenTTLTooLong: the token lives too long.
	TokenTTLTooLong Reason = "TOKEN_TTL_TOO_LONG"
	// TokenNotPodBound: the token is not bound to a pod.
	TokenNotPodBound Reason = "TOKEN_NOT_POD_BOUND"
	// IssuerUnknown: the token's issuer is not one of ours.
	IssuerUnknown Reason = "ISSUER_UNKNOWN"
	// SubjectMalformed: the token's subject is not a ServiceAccount.
	SubjectMalformed Reason = "SUBJECT_MALFORMED"
	// KeysUnavailable: the issuer's key set was never read.
	KeysUnavailable Reason = "KEYS_UNAVAILABLE"
	// EvidenceKind: this kind of evidence is not accepted.
	EvidenceKind Reason = "EVIDENCE_KIND"
	// NodeUnverifiable: the token does not say on which node its pod runs.
	NodeUnverifiable Reason = "NODE_UNVERIFIABLE"
	// TokenReplayedElsewhere: the token was already used in another place.
	TokenReplayedElsewhere Reason = "TOKEN_REPLAYED_ELSEWHERE"
	// TokenReviewRefused: the API server does not accept the token.
	TokenReviewRefused Reason = "TOKEN_REVIEW_REFUSED"
	// TokenReviewMismatch: the API server answered about another token.
	TokenReviewMismatch Reason = "TOKEN_REVIEW_MISMATCH"
	// NotAServiceAccount: the API server does not take the token's owner for a ServiceAccount.
	NotAServiceAccount Reason = "NOT_A_SERVICEACCOUNT"
	// ReviewerNotAudienceAware: the API server did not check the token's audience.
	ReviewerNotAudienceAware Reason = "REVIEWER_NOT_AUDIENCE_AWARE"
	// ReviewerUnavailable: the API server did not answer about the token.
	ReviewerUnavailable Reason = "REVIEWER_UNAVAILABLE"
	// ReviewerOverloaded: too many tokens are being reviewed.
	ReviewerOverloaded Reason = "REVIEWER_OVERLOADED"
	// TokenBound: the token is bound to something, and a person's is not.
	TokenBound Reason = "TOKEN_BOUND"
	// PodDeleted: the pod is gone.
	PodDeleted Reason = "POD_DELETED"
	// PodUnknown: the pod is not known.
	PodUnknown Reason = "POD_UNKNOWN"
	// PodMismatch: the token's pod is not the pod that lives under this name.
	PodMismatch Reason = "POD_MISMATCH"
	// NodeMismatch: the pod runs on another node than the agent that asks.
	NodeMismatch Reason = "NODE_MISMATCH"
	// IssuerMismatch: pod and agent belong to different clusters.
	IssuerMismatch Reason = "ISSUER_MISMATCH"
	// DirectoryUnavailable: the CA cannot see which pods live.
	DirectoryUnavailable Reason = "DIRECTORY_UNAVAILABLE"
	// NotAnAgent: the token does not belong to an agent.
	NotAnAgent Reason = "NOT_AN_AGENT"
	// GraceOver: the API server has been away for too long.
	GraceOver Reason = "GRACE_OVER"
	// TicketInvalid: the renewal ticket is not one of ours.
	TicketInvalid Reason = "TICKET_INVALID"
	// TicketMismatch: the renewal ticket belongs to something else.
	TicketMismatch Reason = "TICKET_MISMATCH"
	// HeldSVIDInvalid: the SVID that was shown cannot be renewed.
	HeldSVIDInvalid Reason = "HELD_SVID_INVALID"
	// PossessionUnproven: the request is not signed by the key of the SVID that was shown.
	PossessionUnproven Reason = "POSSESSION_UNPROVEN"
	// NodeBanned: the node is banned.
	NodeBanned Reason = "NODE_BANNED"
	// NodeAmbiguous: more than one node has this name.
	NodeAmbiguous Reason = "NODE_AMBIGUOUS"
	// CSRTooLarge: the certificate request is too large.
	CSRTooLarge Reason = "CSR_TOO_LARGE"
	// CSRMalformed: the certificate request does not parse.
	CSRMalformed Reason = "CSR_MALFORMED"
	// CSRSignature: the certificate request does not prove possession of its key.
	CSRSignature Reason = "CSR_SIGNATURE"
	// CSRExtraSAN: the certificate request asks for names.
	CSRExtraSAN Reason = "CSR_EXTRA_SAN"
	// CSRURICount: the certificate request has more than one URI.
	CSRURICount Reason = "CSR_URI_COUNT"
	// CSRForbiddenExtension: the certificate request asks for an extension.
	CSRForbiddenExtension Reason = "CSR_FORBIDDEN_EXTENSION"
	// IDMalformed: the SPIFFE ID is malformed.
	IDMalformed Reason = "SPIFFE_ID_MALFORMED"
	// IDMismatch: the request names another identity.
	IDMismatch Reason = "SPIFFE_ID_MISMATCH"
	// KeyType: this type of key is not accepted.
	KeyType Reason = "KEY_TYPE"
	// WeakKey: the key is weak.
	WeakKey Reason = "WEAK_KEY"
	// KeyTooLarge: the key is too large.
	KeyTooLarge Reason = "KEY_TOO_LARGE"
	// KeyReused: the key belongs to another identity.
	KeyReused Reason = "KEY_REUSED"
	// LintFailed: the certificate would not have been a correct SVID.
	LintFailed Reason = "LINT_FAILED"
	// NamespaceNotAllowed: the policy does not allow this namespace.
	NamespaceNotAllowed Reason = "NAMESPACE_NOT_ALLOWED"
	// DNSNameRefused: the policy's DNS name cannot be made for this workload.
	DNSNameRefused Reason = "DNS_NAME_REFUSED"
	// AgentIdentityRequired: an agent's SVID is required.
	AgentIdentityRequired Reason = "AGENT_IDENTITY_REQUIRED"
	// SessionRequired: the agent has no session.
	SessionRequired Reason = "SESSION_REQUIRED"
	// SessionProtocol: the session broke its protocol.
	SessionProtocol Reason = "SESSION_PROTOCOL"
	// SessionEnded: the session has reached its end.
	SessionEnded Reason = "SESSION_ENDED"
	// ProtocolSkew: agent and CA are too far apart.
	ProtocolSkew Reason = "PROTOCOL_SKEW"
	// BatchSize: the batch is empty or too large.
	BatchSize Reason = "BATCH_SIZE"
	// CAUnavailable: the CA cannot be reached.
	CAUnavailable Reason = "CA_UNAVAILABLE"
	// SignerUnavailable: the CA has no intermediate to sign with.
	SignerUnavailable Reason = "SIGNER_UNAVAILABLE"
	// Overloaded: the CA has too much to do.
	Overloaded Reason = "OVERLOADED"
	// BundleRollback: the trust bundle is older than one that was seen.
	BundleRollback Reason = "BUNDLE_ROLLBACK"
	// BundleEquivocation: two different trust bundles claim the same generation.
	BundleEquivocation Reason = "BUNDLE_EQUIVOCATION"
	// SVIDRejected: the SVID that came back is not the one that was asked for.
	SVIDRejected Reason = "SVID_REJECTED"
	// BundleRejected: the trust bundle cannot be used.
	BundleRejected Reason = "BUNDLE_REJECTED"
	// CallUnknown: this call is not served here.
	CallUnknown Reason = "CALL_UNKNOWN"
	// MessageMalformed: the message does not parse.
	MessageMalformed Reason = "MESSAGE_MALFORMED"
	// MessageTooLarge: the message is too large.
	MessageTooLarge Reason = "MESSAGE_TOO_LARGE"
	// ClockSkew: the clocks of a node and the CA differ by too much.
	ClockSkew Reason = "CLOCK_SKEW"
	// ResourceNotAuthorized: the secret belongs to somebody else.
	ResourceNotAuthorized Reason = "RESOURCE_NOT_AUTHORIZED"
	// ResourceName: the secret's name is malformed.
	ResourceName Reason = "RESOURCE_NAME"
	// TypeURL: only secrets are served here.
	TypeURL Reason = "TYPE_URL"
	// TooManyResources: too many secrets on one stream.
	TooManyResources Reason = "TOO_MANY_RESOURCES"
	// StreamLimit: too many streams.
	StreamLimit Reason = "STREAM_LIMIT"
	// SlowConsumer: the client does not read.
	SlowConsumer Reason = "SLOW_CONSUMER"
	// NodeMetadataTooLarge: the request is too large.
	NodeMetadataTooLarge Reason = "METADATA_TOO_LARGE"
	// ReauthRequired: the stream's token is about to expire.
	ReauthRequired Reason = "REAUTH_REQUIRED"
	// AgentStopping: the agent ended the stream.
	AgentStopping Reason = "AGENT_STOPPING"
	// HeaderMissing: the call lacks the Workload API's header.
	HeaderMissing Reason = "HEADER_MISSING"
	// ProfileNotServed: this kind of SVID is not served.
	ProfileNotServed Reason = "PROFILE_NOT_SERVED"
	// VolumeRefused: the pod asks for its volume in a way that is not served.
	VolumeRefused Reason = "VOLUME_REFUSED"
	// VolumeTarget: kubelet wants the volume in a place that is not its own.
	VolumeTarget Reason = "VOLUME_TARGET"
	// VolumeFailed: the system did not let the volume's socket be made or removed.
	VolumeFailed Reason = "VOLUME_FAILED"
	// StateMissing: there is no state.
	StateMissing Reason = "STATE_MISSING"
	// StateExists: there is a state already.
	StateExists Reason = "STATE_EXISTS"
	// StateNewer: the state was written by a newer version.
	StateNewer Reason = "STATE_NEWER"
	// StateCorrupt: the state is damaged.
	StateCorrupt Reason = "STATE_CORRUPT"
	// StateForeign: the state belongs to another trust domain.
	StateForeign Reason = "STATE_FOREIGN"
	// StateLocked: the state is in use.
	StateLocked Reason = "STATE_LOCKED"
	// StateConflict: the state changed meanwhile.
	StateConflict Reason = "STATE_CONFLICT"
	// StateUnknown: it is not known whether the write was kept.
	StateUnknown Reason = "STATE_OUTCOME_UNKNOWN"
	// SealKeyWrong: the seal key does not open the root's key.
	SealKeyWrong Reason = "SEAL_KEY_WRONG"
	// SealKeyMissing: there is no seal key.
	SealKeyMissing Reason = "SEAL_KEY_MISSING"
	// FileUnsafe: a file or folder with secrets is open to others.
	FileUnsafe Reason = "FILE_UNSAFE"
	// BundlePublished: a bundle of this trust domain is already published.
	BundlePublished Reason = "BUNDLE_PUBLISHED"
	// MintBudget: the budget of intermediates is spent.
	MintBudget Reason = "MINT_BUDGET"
	// ConfigInvalid: the configuration is wrong.
	ConfigInvalid Reason = "CONFIG_INVALID"
	// LedgerFailed: the ledger cannot be written.
	LedgerFailed Reason = "LEDGER_FAILED"
	// UpstreamRefused: the root did not sign an acceptable intermediate.
	UpstreamRefused Reason = "UPSTREAM_REFUSED"
	// UpstreamUnavailable: the upstream cannot be asked.
	UpstreamUnavailable Reason = "UPSTREAM_UNAVAILABLE"
	// UpstreamAnswer: the upstream's answer holds no chain of certificates.
	UpstreamAnswer Reason = "UPSTREAM_ANSWER"
	// UpstreamKey: the upstream certified another key, or one that is not accepted.
	UpstreamKey Reason = "UPSTREAM_KEY"
	// UpstreamAuthority: what the upstream signed may not issue SVIDs.
	UpstreamAuthority Reason = "UPSTREAM_NOT_AN_AUTHORITY"
	// UpstreamPathLength: a path length leaves no room for an SVID.
	UpstreamPathLength Reason = "UPSTREAM_PATH_LENGTH"
	// UpstreamTrustDomain: what the upstream signed is not of this trust domain.
	UpstreamTrustDomain Reason = "UPSTREAM_TRUST_DOMAIN"
	// UpstreamChain: the upstream's chain does not lead to a root.
	UpstreamChain Reason = "UPSTREAM_CHAIN"
	// UpstreamRoot: the upstream does not sign under the root that is active.
	UpstreamRoot Reason = "UPSTREAM_ROOT"
	// UpstreamLifetime: the upstream signed for too short a time.
	UpstreamLifetime Reason = "UPSTREAM_LIFETIME"
	// UpstreamClock: what the upstream signed is not valid yet.
	UpstreamClock Reason = "UPSTREAM_CLOCK"
	// UpstreamSubject: the intermediate cannot be told from another authority.
	UpstreamSubject Reason = "UPSTREAM_SUBJECT"
	// UpstreamConstraints: the upstream's name constraints do not admit SVIDs.
	UpstreamConstraints Reason = "UPSTREAM_NAME_CONSTRAINTS"
	// UpstreamAlgorithm: a signature or key of the upstream is not accepted.
	UpstreamAlgorithm Reason = "UPSTREAM_ALGORITHM"
	// UpstreamProbe: an SVID under the intermediate does not verify.
	UpstreamProbe Reason = "UPSTREAM_PROBE"
	// UpstreamCross: the old root does not sign the new one, for whatever reason; a rotation can begin without.
	UpstreamCross Reason = "UPSTREAM_CROSS_CERTIFICATE"
	// UpstreamFiles: the upstream's files cannot be used.
	UpstreamFiles Reason = "UPSTREAM_FILES"
	// UpstreamKeyEncrypted: the upstream's key file is encrypted.
	UpstreamKeyEncrypted Reason = "UPSTREAM_KEY_ENCRYPTED"
	// CacheUnsafe: the cache folder could reach a disk.
	CacheUnsafe Reason = "CACHE_UNSAFE"
	// SocketUnsafe: the socket's path is not safe.
	SocketUnsafe Reason = "SOCKET_UNSAFE"
	// LedgerFull: the ledger has no room.
	LedgerFull Reason = "LEDGER_FULL"
	// LedgerDamaged: the ledger is damaged.
	LedgerDamaged Reason = "LEDGER_DAMAGED"
	// StateFull: the record has no room for more.
	StateFull Reason = "STATE_FULL"
	// StateRollback: the state is older than what was published.
	StateRollback Reason = "STATE_ROLLBACK"
	// BackupDamaged: the backup cannot be used.
	BackupDamaged Reason = "BACKUP_DAMAGED"
	// BundleForeign: where the bundle is to be shown there is something of somebody else's.
	BundleForeign Reason = "BUNDLE_FOREIGN"
	// PublishForbidden: the CA may not write the bundle there.
	PublishForbidden Reason = "PUBLISH_FORBIDDEN"
	// PublishFailed: the bundle could not be written there, or what is there not be seen.
	PublishFailed Reason = "PUBLISH_FAILED"
	// RotationInvalid: the request makes no rotation.
	RotationInvalid Reason = "ROTATION_INVALID"
	// RotationUnderWay: another rotation is under way.
	RotationUnderWay Reason = "ROTATION_UNDER_WAY"
	// RotationOver: that rotation is not under way.
	RotationOver Reason = "ROTATION_OVER"
	// RotationTooLate: the rotation has come too far for this, or not far enough.
	RotationTooLate Reason = "ROTATION_TOO_LATE"
	// RotationBlocked: the next step of the rotation has to wait.
	RotationBlocked Reason = "ROTATION_BLOCKED"
	// BlockersChanged: others stand in the way than were named.
	BlockersChanged Reason = "BLOCKERS_CHANGED"
	// LosingMore: more workloads would lose mTLS than was agreed to.
	LosingMore Reason = "LOSING_MORE"
	// AuthorityRefused: the new root cannot be taken.
	AuthorityRefused Reason = "AUTHORITY_REFUSED"
	// SuccessorNeeded: the compromised root has no successor.
	SuccessorNeeded Reason = "SUCCESSOR_NEEDED"
	// ClockJumped: the CA's clock has jumped.
	ClockJumped Reason = "CLOCK_JUMPED"
	// AdminForbidden: only the CA's own user may do this.
	AdminForbidden Reason = "ADMIN_FORBIDDEN"
	// OperatorRequired: the caller is not an operator.
	OperatorRequired Reason = "OPERATOR_REQUIRED"
	// RoleRequired: the caller is an operator with a smaller role.
	RoleRequired Reason = "ROLE_REQUIRED"
	// ClusterForbidden: the API server does not allow it to this user.
	ClusterForbidden Reason = "CLUSTER_FORBIDDEN"
	// NotFound: there is nothing by that name.
	NotFound Reason = "NOT_FOUND"
	// DeadlineExceeded: it took too long.
	DeadlineExceeded Reason = "DEADLINE_EXCEEDED"
	// Canceled: the caller went away.
	Canceled Reason = "CANCELED"
	// ProgramMissing: a program that is needed is not there.
	ProgramMissing Reason = "PROGRAM_MISSING"
	// DemoFailed: the demo did not show what it should.
	DemoFailed Reason = "DEMO_FAILED"
	// InputUnreadable: what the command was given cannot be read.
	InputUnreadable Reason = "INPUT_UNREADABLE"
	// OutputFailed: what the command has to say cannot be written.
	OutputFailed Reason = "OUTPUT_FAILED"
	// ClusterUnavailable: the cluster cannot be asked.
	ClusterUnavailable Reason = "CLUSTER_UNAVAILABLE"
	// Internal: something is wrong inside Signet.
	Internal Reason = "INTERNAL"
)

var table = []Page{
	{TokenMissing, 101, KindUnauthenticated, "No token came with the request",
		"The caller has to send its ServiceAccount token, and sent none.",
		"Mount a projected token with the audience signet:TRUST-DOMAIN and send it; on the shared socket as `authorization` metadata."},
	{TokenTooLarge, 102, KindUnauthenticated, "The token is too large",
		"A ServiceAccount token is below 16 KiB; this one is not, and was not parsed.",
		"Check which file is being sent: a certificate bundle or a whole kubeconfig is a common mistake."},
	{TokenMalformed, 103, KindUnauthenticated, "The token is not a ServiceAccount token",
		"It is not a compact JWT with the claims that Kubernetes writes.",
		"Send the projected token itself, without quotes, prefix or trailing newline."},
	{TokenAmbiguous, 104, KindUnauthenticated, "More than one token came with the request",
		"Which one to believe would be a guess.",
		"Send exactly one `authorization` value."},
	{TokenSignature, 105, KindUnauthenticated, "The token's signature does not verify",
		"No key of the issuer's key set verifies it, or its algorithm is not one an issuer may use.",
		"Check that the CA's issuer is the cluster that made the token. After a change of the API server's signing key, the key set follows within a minute."},
	{TokenAudience, 106, KindUnauthenticated, "The token is for another audience",
		"A token for another service proves nothing here: that service could replay it.",
		"Project a token with the audience signet:TRUST-DOMAIN (signet-agent:TRUST-DOMAIN for the agent)."},
	{TokenAudienceNotExclusive, 107, KindUnauthenticated, "The token has more than one audience",
		"Each of the other audiences could replay it.",
		"Project a token whose only audience is signet:TRUST-DOMAIN."},
	{TokenExpired, 108, KindUnauthenticated, "The token has expired",
		"kubelet refreshes a projected token at 80 % of its life; this one was not read again, or the clocks differ.",
		"Read the token file anew for each request. If the file itself is stale, look at kubelet's log and at the node's clock."},
	{TokenNotYetValid, 109, KindUnauthenticated, "The token is not valid yet",
		"Its issue time is in the future by the CA's clock.",
		"Compare the clocks of the API server and the CA."},
	{TokenTTLTooLong, 110, KindUnauthenticated, "The token lives too long",
		"Its lifetime is above the configured limit (24 h by default), as that of tokens which the API server extends to a year.",
		"Project a token with expirationSeconds of 3600 or less."},
	{TokenNotPodBound, 111, KindUnauthenticated, "The token is not bound to a pod",
		"Only a token that dies with its pod proves that the pod asks.",
		"Use a projected volume; a token from a Secret, from `kubectl create token` or bound to a node is refused."},
	{IssuerUnknown, 112, KindUnauthenticated, "The token's issuer is not one of ours",
		"Its `iss` is not in the CA's configuration.",
		"Add the cluster's issuer to the CA's configuration, or send the token to the CA of that cluster."},
	{SubjectMalformed, 113, KindUnauthenticated, "The token's subject is not a ServiceAccount",
		"Its `sub` is not system:serviceaccount:NAMESPACE:NAME, or contradicts its Kubernetes claims.",
		"Send a token that the Kubernetes API server issued."},
	{KeysUnavailable, 114, KindUnavailable, "The issuer's key set was never read",
		"Without a key set no token of that issuer can be checked, so nothing is.",
		"Check jwks of the issuer in the CA's configuration: the file must exist, the URL must answer."},
	{EvidenceKind, 115, KindInvalid, "This kind of evidence is not accepted",
		"The CA has no attestor for it.",
		"Use agent and CA of versions that belong together."},
	{NodeUnverifiable, 116, KindPermissionDenied, "The token does not say on which node its pod runs",
		"Node claims come with Kubernetes 1.32 and later; without them a stolen token is worth something on every node.",
		"Upgrade the cluster."},
	{TokenReplayedElsewhere, 117, KindPermissionDenied, "The token was already used in another place",
		"One token serves one node and one volume. Either it was copied, or two volumes share it.",
		"Find out who else had this token: `signet why CORRELATION-ID` names the time and the place of the first use."},
	{TokenReviewRefused, 118, KindUnauthenticated, "The API server does not accept the token",
		"Its signature and times are good, but the cluster says no: the pod, its ServiceAccount or its node is gone or was recreated, or the token was revoked.",
		"Restart the workload so that it reads a token of its own. What the API server said is in the CA's log, under the correlation id."},
	{TokenReviewMismatch, 119, KindUnauthenticated, "The API server answered about another token",
		"Name, UID, pod, node or token id in its answer are not those of the token that was sent.",
		"Treat it as an incident: whatever answers in place of the API server mixes up its answers or invents them."},
	{NotAServiceAccount, 120, KindUnauthenticated, "The API server does not take the token's owner for a ServiceAccount",
		"The answer lacks the group system:serviceaccounts: another authenticator of the API server claimed the token, for a user named like a ServiceAccount.",
		"Look at the API server's OIDC and webhook authenticators: one of them accepts tokens of its own cluster."},
	{ReviewerNotAudienceAware, 121, KindUnauthenticated, "The API server did not check the token's audience",
		"Its answer does not name exactly our audience, so the token may have been accepted as one for somebody else.",
		"Make sure that no authenticating proxy or webhook of old stands between the CA and the API server. There is no second try without an audience."},
	{ReviewerUnavailable, 122, KindUnavailable, "The API server did not answer about the token",
		"It could not be reached in time, refused the CA, or its answer was not usable. A token that must be reviewed is never believed without a review.",
		"Look at the CA's log for what went wrong and at its /readyz for a missing permission. SVIDs that are held stay valid meanwhile."},
	{ReviewerOverloaded, 123, KindUnavailable, "Too many tokens are being reviewed",
		"As many reviews are on their way to the API server as the CA allows itself, so that a flood of tokens cannot take the API server down.",
		"Nothing: the caller comes back after the delay. If it lasts, look at how long the API server takes, then at issuers[].tokenReview.maxInFlight."},
	{TokenBound, 124, KindUnauthenticated, "The token is bound to something, and a person's is not",
		"Operators' tokens are asked for by people. One that is bound to a pod, a node or a secret came from a kubelet or lies in the cluster, where others reach it.",
		"Let `signet` ask for the token itself, or `kubectl create token` without --bound-object-kind."},
	{PodDeleted, 201, KindPermissionDenied, "The pod is gone",
		"An identity ends with its pod.",
		"Nothing, if the pod was deleted. Otherwise compare the pod's UID with the token's."},
	{PodUnknown, 202, KindPermissionDenied, "The pod is not known",
		"The CA's directory of live pods has no such pod.",
		"Check that the CA watches the cluster that made the token."},
	{PodMismatch, 203, KindPermissionDenied, "The token's pod is not the pod that lives under this name",
		"UID, ServiceAccount or node differ: the pod was recreated, or the token belongs to another.",
		"Restart the workload so that it reads its own token."},
	{NodeMismatch, 204, KindPermissionDenied, "The pod runs on another node than the agent that asks",
		"An agent gets identities of its own node only. A token seen on a foreign node was stolen or mislaid.",
		"Treat it as an incident unless you moved tokens by hand."},
	{IssuerMismatch, 205, KindPermissionDenied, "Pod and agent belong to different clusters",
		"The token's issuer is not that of the agent's session.",
		"Connect each cluster's agents with tokens of their own cluster."},
	{DirectoryUnavailable, 206, KindUnavailable, "The CA cannot see which pods live",
		"Its directory of pods does not answer, and a new identity is never given on a guess.",
		"Look at the CA's /readyz, which names a permission that is missing, and at its log. Known SVIDs stay valid meanwhile."},
	{NotAnAgent, 207, KindPermissionDenied, "The token does not belong to an agent",
		"Only pods of the configured namespace and ServiceAccount that the agents' DaemonSet controls may be agents, where the CA sees their cluster. Of a DaemonSet that was deleted and made anew they are once it has adopted them.",
		"Compare `agents` in the CA's configuration with the agents' DaemonSet. A pod that somebody else has made under their ServiceAccount is an incident."},
	{GraceOver, 208, KindUnavailable, "The API server has been away for too long",
		"While the CA cannot see the cluster, known workloads are renewed without fresh tokens for a bounded time (directory.grace, 4 h by default). It is over.",
		"Bring the API server back, or the way from the CA to it: see docs/api-server-away.md. SVIDs that are held stay valid until they expire."},
	{TicketInvalid, 209, KindPermissionDenied, "The renewal ticket is not one of ours",
		"It is damaged, too old, or was made under a key that this record does not have, as after a restored backup.",
		"Nothing while the API server is there: tickets are only asked for while it is away. If it is a restored record, its workloads are renewed once kubelet brings fresh tokens."},
	{TicketMismatch, 210, KindPermissionDenied, "The renewal ticket belongs to something else",
		"A ticket is bound to one SVID and its key, one pod, ServiceAccount, node and volume, and to the token with which the SVID was asked for. The message says which of them differs.",
		"Treat it as an incident unless state was moved between nodes by hand: whoever sent it has a ticket that is not his."},
	{HeldSVIDInvalid, 211, KindPermissionDenied, "The SVID that was shown cannot be renewed",
		"It has expired, is not of the identity that the policy gives this workload, or does not verify against the trust bundle.",
		"Nothing: the workload waits until the API server is back, and is then attested like a new one."},
	{PossessionUnproven, 212, KindPermissionDenied, "The request is not signed by the key of the SVID that was shown",
		"A ticket and a certificate are no secrets. Who renews by them proves that he holds the key.",
		"Treat it as an incident: somebody has a ticket and no key to it."},
	{NodeBanned, 221, KindPermissionDenied, "The node is banned",
		"An operator banned it with `signet node ban`: its agent has no session and gets no SVID, and no pod on it does, until the ban is taken back. What the node held then is valid until it expires.",
		"`signet node list` says who banned it, when and why. If the node is to be trusted again: `signet node allow NODE`; its agent comes back within minutes, by itself."},
	{NodeAmbiguous, 222, KindInvalid, "More than one node has this name",
		"Two clusters have a node of that name, or one was made anew under it and is another node by its UID. Whom to ban is never guessed.",
		"Name it by its UID, or say --cluster; `signet node list -o wide` shows both."},
	{CSRTooLarge, 301, KindInvalid, "The certificate request is too large",
		"It is above 16 KiB and was not parsed.",
		"Send a PKCS#10 request with a key and nothing else."},
	{CSRMalformed, 302, KindInvalid, "The certificate request does not parse",
		"It is not one DER-encoded PKCS#10 request without anything behind it.",
		"Make the request with a current library."},
	{CSRSignature, 303, KindInvalid, "The certificate request does not prove possession of its key",
		"Its own signature does not verify, or uses SHA-1 or MD5.",
		"Sign the request with the key that it contains."},
	{CSRExtraSAN, 304, KindInvalid, "The certificate request asks for names",
		"Names come from attestation. Besides the one SPIFFE ID that attestation yields, a request may name nothing.",
		"Send a request without subject alternative names."},
	{CSRURICount, 305, KindInvalid, "The certificate request has more than one URI",
		"An SVID has exactly one.",
		"Send a request without URIs, or with the one SPIFFE ID."},
	{CSRForbiddenExtension, 306, KindInvalid, "The certificate request asks for an extension",
		"Usage, lifetime and constraints are the CA's alone; a request that wants any is refused rather than ignored.",
		"Send a request without extensions."},
	{IDMalformed, 307, KindInvalid, "The SPIFFE ID is malformed",
		"It breaks the SPIFFE-ID specification or is not in its canonical form.",
		"Leave the URI out of the request."},
	{IDMismatch, 308, KindPermissionDenied, "The request names another identity",
		"Identity comes from what was attested, never from what was asked.",
		"Leave the URI out of the request."},
	{KeyType, 309, KindInvalid, "This type of key is not accepted",
		"Accepted are ECDSA P-256 and P-384, RSA of 2048 to 4096 bits, and Ed25519 where the policy says so.",
		"Make a P-256 key."},
	{WeakKey, 310, KindInvalid, "The key is weak",
		"Its modulus, exponent or point is one that can be broken.",
		"Make a new key with a current library."},
	{KeyTooLarge, 311, KindInvalid, "The key is too large",
		"An RSA key above 4096 bits costs more to check than it gives.",
		"Make a P-256 key."},
	{KeyReused, 312, KindPermissionDenied, "The key belongs to another identity",
		"The same public key was certified for somebody else and that SVID has not expired.",
		"Make a key for each identity, and a fresh one for each renewal."},
	{LintFailed, 313, KindInternal, "The certificate would not have been a correct SVID",
		"The CA checks each certificate before and after it signs, and keeps back one that fails.",
		"Report it with the correlation id. Nothing was issued."},
	{NamespaceNotAllowed, 314, KindPermissionDenied, "The policy does not allow this namespace",
		"No rule of the CA's policy file covers it.",
		"Add the namespace to the policy file, then restart the CA."},
	{DNSNameRefused, 315, KindPermissionDenied, "The policy's DNS name cannot be made for this workload",
		"A placeholder stands for one label of at most 63 characters; a ServiceAccount with dots in its name would make several, and so reach the names of others.",
		"Rename the ServiceAccount, or leave it out of the policy's rule with dnsNames."},
	{AgentIdentityRequired, 601, KindUnauthenticated, "An agent's SVID is required",
		"The call needs a client certificate of an agent of this trust domain that verifies now.",
		"Attest the agent again; a workload's SVID is never enough here."},
	{SessionRequired, 602, KindNotReady, "The agent has no session",
		"A token is worth nothing without the session of the agent on its node.",
		"The agent opens one by itself; look at its log for why it could not."},
	{SessionProtocol, 603, KindInvalid, "The session broke its protocol",
		"Its first message must be Hello, and only Report may follow.",
		"Use agent and CA of versions that belong together."},
	{SessionEnded, 604, KindUnavailable, "The session has reached its end",
		"Sessions end when the agent's SVID does, when the CA stops, and from time to time so that replicas balance.",
		"Nothing: the agent opens a new one."},
	{ProtocolSkew, 605, KindNotReady, "Agent and CA are too far apart",
		"One side speaks a version of the protocol that the other does not.",
		"Upgrade the one that the message names; docs/upgrades.md says which versions go together."},
	{BatchSize, 606, KindInvalid, "The batch is empty or too large",
		"One call carries 1 to 64 requests.",
		"Split the batch."},
	{CAUnavailable, 607, KindUnavailable, "The CA cannot be reached",
		"The connection failed or the CA is stopping. SVIDs that are held stay valid and are served.",
		"Look at the CA's /readyz and at the network between."},
	{SignerUnavailable, 608, KindUnavailable, "The CA has no intermediate to sign with",
		"The root could not be asked, or the hourly budget of intermediates is spent.",
		"Look at the CA's /readyz, which says which; issuance goes on by itself once it is mended."},
	{Overloaded, 609, KindExhausted, "The CA has too much to do",
		"The limit of concurrent work is reached; this request was refused before it cost anything.",
		"Nothing: the caller comes back after the delay."},
	{BundleRollback, 610, KindNotReady, "The trust bundle is older than one that was seen",
		"A generation never goes down; a lower one is a restored or a foreign CA.",
		"If a backup was restored, use `signet restore`, which raises the epoch."},
	{BundleEquivocation, 611, KindNotReady, "Two different trust bundles claim the same generation",
		"That cannot happen to one CA. Nothing was applied.",
		"Treat it as an incident: two CAs claim this trust domain."},
	{SVIDRejected, 612, KindInternal, "The SVID that came back is not the one that was asked for",
		"Key, SPIFFE ID or chain do not fit what the agent holds; it keeps the last good one.",
		"Look at the agent's log, which says what differed."},
	{BundleRejected, 613, KindInternal, "The trust bundle cannot be used",
		"It holds no authority, something that is not one, or one trust domain twice. The last good one is kept: an empty bundle must never reach a proxy.",
		"Report it with the log around it; look at the CA's `signet bundle`."},
	{CallUnknown, 614, KindUnimplemented, "This call is not served here",
		"The CA does not know it, or answers it on another of its ports: those of operators only on the admin socket.",
		"Use programs of versions that belong together; docs/authorization.md lists every call, where it is served and who may make it."},
	{MessageMalformed, 615, KindInvalid, "The message does not parse",
		"It is not the protobuf message of this call, a text in it is not UTF-8, or it did not come as one whole message of gRPC: cut short, compressed, none or two.",
		"Use programs of versions that belong together; look at what stands between them."},
	{MessageTooLarge, 616, KindInvalid, "The message is too large",
		"Its length is above what the largest message of the call needs; nothing of it was read.",
		"Use programs of versions that belong together; an agent sends at most 64 requests in one call."},
	{ClockSkew, 617, KindNotReady, "The clocks of the node and the CA differ by too much",
		"What the CA shows or has just issued is not valid by the node's clock. Nothing of it is used; what is held is served until it ends by that clock.",
		"Set the clock that is wrong (`chronyc tracking`, `timedatectl`); the message has both times. What waited goes on within half a minute."},
	{ResourceNotAuthorized, 701, KindPermissionDenied, "The secret belongs to somebody else",
		"A stream gets the secrets of the workload that it belongs to, and no other.",
		"Ask for default, ROOTCA, ALL, the workload's own SPIFFE ID or its trust domain."},
	{ResourceName, 702, KindInvalid, "The secret's name is malformed",
		"Names are at most 2048 bytes of printable ASCII.",
		"Ask for default, ROOTCA, ALL, a SPIFFE ID or a trust domain's ID."},
	{TypeURL, 703, KindInvalid, "Only secrets are served here",
		"The request's type_url is not that of Envoy's Secret.",
		"Point only SDS at this socket."},
	{TooManyResources, 704, KindExhausted, "Too many secrets on one stream",
		"A stream may subscribe to 64 names.",
		"Ask for fewer names; ALL holds every trust bundle."},
	{StreamLimit, 705, KindExhausted, "Too many streams",
		"The workload or the socket has reached its limit of streams.",
		"Look for a client that opens streams and does not close them."},
	{SlowConsumer, 706, KindExhausted, "The client does not read",
		"A pushed secret could not be delivered in time; the stream was ended.",
		"Look at the client: it is stopped or overloaded."},
	{NodeMetadataTooLarge, 707, KindInvalid, "The request is too large",
		"The node's description is above 64 KiB.",
		"Send a node id and no metadata; nothing of it is believed anyway."},
	{ReauthRequired, 708, KindUnavailable, "The stream's token is about to expire",
		"A token is read when a stream opens, so a stream ends before its token does.",
		"Nothing: the proxy opens a new stream with the fresh token and keeps its secrets."},
	{AgentStopping, 709, KindUnavailable, "The agent ended the stream",
		"It is stopping or restarting, or no longer serves this workload here.",
		"Nothing: the proxy keeps its secrets and opens a new stream."},
	{HeaderMissing, 710, KindInvalid, "The call lacks the Workload API's header",
		"The SPIFFE Workload Endpoint answers only calls with the metadata `workload.spiffe.io: true`, once and in lower case, so that nobody can be tricked into making one.",
		"Use a SPIFFE library, which sends it, or add it: `grpcurl -H 'workload.spiffe.io: true'`. The workload needs no other credential."},
	{ProfileNotServed, 711, KindUnimplemented, "This kind of SVID is not served",
		"This version serves X.509-SVIDs and their bundles; JWT-SVIDs come with a later one.",
		"Use X.509-SVIDs. A library that waits for JWT bundles too, as go-spiffe's JWTSource and BundleSource do, waits in vain: use its X509Source."},
	{VolumeRefused, 721, KindInvalid, "The pod asks for its volume in a way that is not served",
		"Signet's volume is inline, read-only and without attributes: one that takes anything from the pod's author could take a token.",
		"Write it in the pod as `csi: {driver: csi.signet.dev, readOnly: true}` and nothing more."},
	{VolumeTarget, 722, KindInvalid, "kubelet wants the volume in a place that is not its own",
		"A volume belongs in pods/UID/volumes/kubernetes.io~csi/NAME/mount of kubelet's folder, under the UID of its pod.",
		"Give the agent kubelet's --root-dir, and mount its folder pods at the very same path."},
	{VolumeFailed, 723, KindUnavailable, "The system did not let the volume's socket be made or removed",
		"A call to the system failed; the message says which and how.",
		"kubelet tries again by itself. If it goes on, look at the node: room and inodes of kubelet's disk, open files, rights of the agent."},
	{StateMissing, 801, KindNotReady, "There is no state",
		"`signet-ca run` never makes a root, so that a lost volume does not become a new one.",
		"For a new trust domain run `signet-ca init`. For an old one restore its volume, or a backup with `signet-ca restore`: docs/backup.md."},
	{StateExists, 802, KindNotReady, "There is a state already",
		"`signet-ca init` makes a root once and never replaces one.",
		"Run `signet-ca run`. To put a backup in its place, which keeps it: `signet-ca restore --replace FILE`. To start over, remove the store by hand, and know that every SVID dies with its root."},
	{StateNewer, 803, KindNotReady, "The state was written by a newer version",
		"Its schema is higher than what this build knows; reading it could drop fields that matter.",
		"Run the newer version again, or restore the backup made before the upgrade: docs/upgrades.md."},
	{StateCorrupt, 804, KindInternal, "The state is damaged",
		"It does not parse or contradicts itself. Nothing was changed, and no new root was made.",
		"Restore a backup, which keeps the damaged file: `signet-ca restore --replace FILE`, docs/backup.md."},
	{StateForeign, 805, KindNotReady, "The state belongs to another trust domain",
		"A trust domain is never renamed: its name is in every SVID.",
		"Point the store at the right file, or trustDomain at the right name."},
	{StateLocked, 806, KindNotReady, "The state is in use",
		"Another signet-ca process holds the store's lock.",
		"Stop the other process. The operator's tool speaks to a running CA and never opens the store."},
	{StateConflict, 807, KindConflict, "The state changed meanwhile",
		"Another writer was first; nothing was changed.",
		"Nothing: it is read again and retried."},
	{StateUnknown, 808, KindInternal, "It is not known whether the write was kept",
		"The disk reported an error at the moment of truth. The process ends, reads what is there, and goes on from it.",
		"Look at the disk and its file system."},
	{SealKeyWrong, 809, KindNotReady, "The seal key does not open the root's key",
		"It is another key than the one that sealed it.",
		"Put the right key in place. There is no other way to open it, and no new root is made."},
	{SealKeyMissing, 810, KindNotReady, "There is no seal key",
		"The root's key is sealed under a key that is kept apart from the store, and that file is not there.",
		"Put the key file back in place, as seal.keyFile of the configuration says."},
	{FileUnsafe, 811, KindNotReady, "A file or folder with secrets is open to others",
		"Others may read or replace it.",
		"Make it readable by its owner alone (chmod 0600, folders 0700), owned by the user who runs the process, and not a symbolic link."},
	{BundlePublished, 812, KindNotReady, "A bundle of this trust domain is already published",
		"Somewhere a CA of this trust domain exists or existed. A second root would break everything that trusts the first.",
		"Restore the first CA. If it is gone for good, remove the published bundle and run init again."},
	{MintBudget, 813, KindUnavailable, "The budget of intermediates is spent",
		"So many were minted under this root in the last hour that a crash loop is likely; each stays valid for a day.",
		"Find out why the CA restarts. The budget frees itself within the hour."},
	{ConfigInvalid, 814, KindInvalid, "The configuration is wrong",
		"A value is missing, unknown, twice there or out of range; the message says which and where.",
		"Mend the line it names; `signet-ca check-config` tells whether all is well."},
	{LedgerFailed, 815, KindUnavailable, "The ledger cannot be written",
		"Nothing is issued that is not on record.",
		"Free disk space or mend the disk, then start the CA again."},
	{UpstreamRefused, 816, KindUnavailable, "The root did not sign an acceptable intermediate",
		"It declined, or its issuer may not sign an intermediate. Nothing changed: issuance goes on under the one that is there.",
		"The message says why; look at the upstream's configuration: docs/upstreams.md."},
	{CacheUnsafe, 817, KindNotReady, "The cache folder could reach a disk",
		"The agent's cache holds keys, so it must be on a tmpfs, on a node without swap.",
		"Mount a tmpfs there and turn swap off, or set cache.dir to \"\" and lose the warm restart."},
	{SocketUnsafe, 818, KindNotReady, "The socket's path is not safe",
		"Its folder is open to others, or something that is not a socket lies there.",
		"Use a folder that only this user can write to, and remove what lies there."},
	{LedgerFull, 819, KindUnavailable, "The ledger has no room",
		"Room for decisions is reserved before it is needed, and none could be: the disk is full. Nothing is issued that is not on record; all else goes on.",
		"Free disk space where ledger.dir lies. Issuance goes on by itself within seconds."},
	{LedgerDamaged, 820, KindInternal, "The ledger is damaged",
		"A line is not the one that was written there, or a segment is missing. What was found before it is good.",
		"Run `signet-ca ledger verify`, which names every place, and keep the folder. Look at the disk."},
	{StateFull, 821, KindExhausted, "The record has no room for more",
		"It is one small record that every replica reads whole, so what it holds is bounded: a thousand bans, 512 KiB of them.",
		"`signet node list` shows the bans; take back those of nodes that no longer exist: `signet node allow UID`."},
	{StateRollback, 822, KindNotReady, "The state is older than what was published",
		"A bundle of a later generation is published, or one of the same with other roots, so this is an earlier copy of the state, which may have gone on by itself: agents would refuse what it serves, and a root that was removed or compromised since could be active in it.",
		"Put the latest volume back, or restore a backup: `signet-ca restore` makes a generation above every one that was shown. If nobody put an old copy in place, somebody changed what is published: docs/backup.md."},
	{BackupDamaged, 823, KindInvalid, "The backup cannot be used",
		"It is no backup, was cut off or changed, or is too large; the message says which. Nothing was changed.",
		"Take another copy, or the backup before it. `signet-ca restore --dry-run FILE` checks one and changes nothing."},
	{LosingMore, 824, KindConflict, "More workloads would lose mTLS than was agreed to",
		"An emergency is confirmed by the number of workloads under the compromised root. By now there are more, by more than a twentieth. Nothing was changed.",
		"Look again with `signet rotate emergency ID --dry-run`, and confirm the number that is there now, or a larger one: fewer are no reason to refuse."},
	{BundleForeign, 825, KindConflict, "Something of somebody else's is where the bundle is to be shown",
		"The namespace asks for a copy of the bundle by its label, and has a ConfigMap of that name which the CA did not make. It is left alone, so pods there do not get the bundle.",
		"Find out whose it is. Rename it, or take the label `signet.dev/bundle` from the namespace: `signet check` has the line to type."},
	{PublishForbidden, 826, KindNotReady, "The CA may not write the bundle there",
		"The API server, an admission policy or the file system refuses it.",
		"`signet check` names the permission that is missing; docs/cluster.md has those that each place needs."},
	{PublishFailed, 827, KindUnavailable, "The bundle could not be written there",
		"The API server or the disk failed, refused what was sent or did not answer, or what is there cannot be seen. It is tried again.",
		"The CA's log and `signet_bundle_write_failures_total` say why; `signet check` looks at each place."},
	{RotationInvalid, 831, KindInvalid, "The request makes no rotation",
		"Something that it needs is missing or out of range: an id, who asks, a reason, a limit, a time.",
		"The message says what; `signet rotate --help` has the ranges."},
	{RotationUnderWay, 832, KindConflict, "Another rotation is under way",
		"There is one at a time, so that each step can be judged by evidence. The message says which it is and who began it.",
		"Look at it with `signet rotate status`; it can be aborted or rolled back. For a compromised root there is `signet rotate emergency`, which waits for none."},
	{RotationOver, 833, KindNotReady, "That rotation is not under way",
		"It has ended, somebody else ended it, or it was never begun. Nothing was changed.",
		"Look at `signet rotate status`, which also has the last ones and how they ended."},
	{RotationTooLate, 834, KindNotReady, "The rotation has come too far for this, or not far enough",
		"It can be aborted until the new root is active, and rolled back from then until the old one is removed or is about to expire; never onto a compromised root.",
		"The message says where it stands. What cannot be undone any more is followed by another rotation."},
	{RotationBlocked, 835, KindNotReady, "The next step of the rotation has to wait",
		"Somebody does not have what he needs for it yet, or unexpired SVIDs would be refused everywhere. The message names it.",
		"Mend whom it names, excuse him for a while (`signet rotate excuse`), or wait: `signet rotate status` says until when. SVIDs that have not expired are waited for, whatever is forced."},
	{BlockersChanged, 836, KindConflict, "Others stand in the way than were named",
		"A step is forced over exactly those whose names were seen and agreed to. Meanwhile somebody else stands there, or one of them no longer does.",
		"Look at `signet rotate status` and decide anew."},
	{AuthorityRefused, 837, KindInvalid, "The new root cannot be taken",
		"Its key, its name or it itself was here before, it expires too soon, or its cross-signed certificate is not what it should be. Nothing was changed.",
		"The message says which. Have the upstream make a new root, with a key and a name of its own, or configure one that does: `upstream.kind: selfsigned`."},
	{SuccessorNeeded, 838, KindNotReady, "The compromised root has no successor",
		"It is the active one. Taken out without another in its place, nothing could be issued.",
		"Give the emergency a new root: `signet rotate emergency` makes one where the root is self-managed."},
	{ClockJumped, 839, KindNotReady, "The CA's clock has jumped",
		"By this clock the record's last change is yet to come. What waits for a time cannot be judged, so nothing moves by itself.",
		"Set the clock (`chronyc tracking`). If the record was written while the clock was ahead, force the step, or abort the rotation and begin it anew."},
	{UpstreamUnavailable, 840, KindUnavailable, "The upstream cannot be asked",
		"It did not answer, or what it needs is not there.",
		"Issuance goes on under the intermediate that is there. Bring the upstream back before that ends: `signet authority list` says when."},
	{UpstreamAnswer, 841, KindUnavailable, "The upstream's answer holds no chain of certificates",
		"It is empty, has a hole, or has more certificates than a chain can have.",
		"The message says what was found; look at how the upstream signs intermediates: docs/upstreams.md. Issuance goes on under the intermediate that is there, and it is tried again."},
	{UpstreamKey, 842, KindUnavailable, "The upstream certified another key",
		"The intermediate is not for the key of the request, or for one of a kind that is not accepted. Nobody here could sign with it.",
		"The message says what was found; look at how the upstream signs intermediates: docs/upstreams.md. Issuance goes on under the intermediate that is there, and it is tried again."},
	{UpstreamAuthority, 843, KindUnavailable, "What the upstream signed may not issue SVIDs",
		"The intermediate, or an authority above it, is not marked as a CA, may not sign certificates, or not for both servers and clients.",
		"Let the upstream sign it as a CA with key usage certificate signing and no extended usages: docs/upstreams.md has the settings of each."},
	{UpstreamPathLength, 844, KindUnavailable, "A path length leaves no room for an SVID",
		"An authority on the way to the root allows fewer authorities below it than there are.",
		"Use an issuer whose path length allows one more authority below it, or has none."},
	{UpstreamTrustDomain, 845, KindUnavailable, "What the upstream signed is not of this trust domain",
		"It names another trust domain, the ID of a workload, or more than one.",
		"Look at the URIs that the upstream puts in: it is to copy the one of the request, or to put none."},
	{UpstreamChain, 846, KindUnavailable, "The upstream's chain does not lead to a root",
		"A certificate between the intermediate and the root is missing, or is not what it seems.",
		"Give the upstream its whole chain; for files, the chain in certificateFile and the root in rootsFile."},
	{UpstreamRoot, 847, KindUnavailable, "The upstream does not sign under the active root",
		"It has another root than the one that is active in the record. Nothing is signed under a root before everyone trusts it.",
		"A new root is taken up by a rotation, never by itself. If it was not meant to change, put back what the upstream had."},
	{UpstreamLifetime, 848, KindUnavailable, "The upstream signed for too short a time",
		"The intermediate, or an authority above it, ends before two of the longest SVIDs have.",
		"Let the upstream sign for as long as it is asked to, and renew what is about to end above it."},
	{UpstreamClock, 849, KindUnavailable, "What the upstream signed is not valid yet",
		"Its clock is ahead of the clock of the CA by more than a minute.",
		"Set the clock that is wrong: `chronyc tracking`, `timedatectl`."},
	{UpstreamSubject, 850, KindUnavailable, "The intermediate cannot be told from another authority",
		"Its subject is that of another authority, it has no key identifier, or it does not name the key that signed it. Verifiers find an issuer by these.",
		"Let the upstream take the subject from the request, and write both key identifiers."},
	{UpstreamConstraints, 851, KindUnavailable, "The upstream's name constraints do not admit SVIDs",
		"An authority on the way to the root permits or excludes names so that the SVIDs of this trust domain would not verify.",
		"Use an issuer without constraints of URIs, or with ones that admit the trust domain."},
	{UpstreamAlgorithm, 852, KindUnavailable, "A signature or key of the upstream is not accepted",
		"SHA-1, MD5, RSA below 2048 bits or P-224 stand between the intermediate and the root.",
		"Use an issuer with a current key, and let it sign with SHA-256 or better."},
	{UpstreamProbe, 853, KindUnavailable, "An SVID under the intermediate does not verify",
		"The CA's own identity is issued first, under each fresh intermediate, and that one did not verify. Nothing else was issued under it.",
		"Look at the extensions of the authorities above, such as policies: the log says what was found."},
	{UpstreamCross, 854, KindUnavailable, "The old root does not sign the new one",
		"Its upstream signs no roots or does not have its key, it may not vouch for another root, or what it signed is not what was asked for. Nothing was used, and no rotation was begun.",
		"`signet rotate plan` says which. `signet rotate start --without-cross` begins without: then everybody is waited for who has only the old root."},
	{UpstreamFiles, 855, KindUnavailable, "The upstream's files cannot be used",
		"Key, certificates and roots do not parse, are too large or do not fit together. They are taken together or not at all; what was read last is kept.",
		"Put all three in place; the message says what is wrong. Replace them as one, by renaming a folder or as Kubernetes does it."},
	{UpstreamKeyEncrypted, 856, KindUnavailable, "The upstream's key is encrypted",
		"The key file needs a passphrase, and there is nobody to type it.",
		"Store the key as unencrypted PKCS #8 with mode 0600, on a disk or in a Secret that is encrypted as a whole: `openssl pkcs8 -topk8 -nocrypt`."},
	{AdminForbidden, 901, KindPermissionDenied, "Only the CA's own user may do this",
		"The admin socket belongs to the user who runs the CA, and to root.",
		"Run the command as that user."},
	{NotFound, 902, KindNotFound, "There is nothing by that name",
		"No authority, SVID or code matches.",
		"List what there is first."},
	{DeadlineExceeded, 903, KindDeadline, "It took too long",
		"The deadline passed before an answer was there.",
		"Try again; it is safe to."},
	{Canceled, 904, KindCanceled, "The caller went away",
		"The request was ended by the one who made it.",
		"Nothing."},
	{ProgramMissing, 905, KindNotReady, "A program that is needed is not there",
		"The demo starts signet-ca and signet-agent as programs of their own, from the folder of signet itself.",
		"Build or install them beside signet, or name their folder with --bin-dir."},
	{DemoFailed, 906, KindInternal, "The demo did not show what it should",
		"A request failed, a stranger got in, or certificates did not change; the message says which.",
		"Read the logs that it kept: one for each program. Run it again with --keep to see the configurations too."},
	{InputUnreadable, 907, KindInvalid, "What the command was given cannot be read",
		"The file is missing, too large or not what the command reads, or nobody speaks TLS at the address.",
		"Check the path or the address; `signet svid inspect --help` says what is accepted."},
	{OutputFailed, 908, KindNotReady, "What the command has to say cannot be written",
		"The disk is full or failed, or whoever read the output went away.",
		"Make room or name another place, and give the command again: a file that is not whole was removed."},
	{ClusterUnavailable, 909, KindUnavailable, "The cluster cannot be asked",
		"The kubeconfig names no cluster, or its API server does not answer or does not take the credentials in it.",
		"Try `kubectl cluster-info` with the same kubeconfig and context; what helps there helps here."},
	{OperatorRequired, 910, KindPermissionDenied, "The caller is not an operator",
		"The operators' port takes tokens of the three ServiceAccounts viewer, operator and emergency in the operators' namespace, and the break-glass certificates of the configuration. An SVID, whoever's, opens nothing there.",
		"Let `signet` ask for the token itself: `signet --as-role viewer ...`. docs/operators.md tells how people are given a role."},
	{RoleRequired, 911, KindPermissionDenied, "The caller's role does not allow this",
		"A viewer may look, an operator may also change what can be changed back, and only an emergency responder may do what is meant for an incident.",
		"Say the role that the message names: `signet --as-role ROLE ...`. docs/authorization.md has a row for each call."},
	{ClusterForbidden, 912, KindPermissionDenied, "The API server does not allow it to this user",
		"Kubernetes RBAC says who may operate Signet: who may have a token for one of its roles, and may forward a port to the CA's pod.",
		"Ask a cluster administrator for the role that the message names; docs/operators.md has the lines to type. `signet check` says which roles you have."},
	{Internal, 999, KindInternal, "Something is wrong inside Signet",
		"This should not happen.",
		"Report it with the correlation id and the log around it."},
}
