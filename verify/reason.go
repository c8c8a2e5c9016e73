package verify

import "fmt"

// Reason is the stable name of what made a receiver refuse.
type Reason string

// The reasons, in the order in which a receiver checks.
const (
	ReasonForm        Reason = "form"
	ReasonHeader      Reason = "header"
	ReasonCertificate Reason = "certificate"
	ReasonExpired     Reason = "certificate_expired"
	ReasonRevoked     Reason = "certificate_revoked"
	ReasonRevocation  Reason = "revocation_unknown"
	ReasonSignature   Reason = "signature"
	ReasonStatement   Reason = "statement"
	ReasonAudience    Reason = "audience"
	ReasonStale       Reason = "expired"
	ReasonFuture      Reason = "not_yet_valid"
	ReasonReplay      Reason = "replay"
	ReasonCounter     Reason = "counter"
	ReasonStore       Reason = "replay_store"
	ReasonBody        Reason = "body"
	ReasonRequest     Reason = "request"
	ReasonRoute       Reason = "route"
	ReasonKind        Reason = "kind"
	ReasonMismatch    Reason = "mismatch"
	ReasonPolicy      Reason = "policy"
	ReasonScope       Reason = "scope"
	ReasonLimits      Reason = "limits"
	ReasonAttestation Reason = "attestation_age"
	ReasonKilled      Reason = "killed"
	ReasonKillState   Reason = "kill_state_unknown"

	ReasonSourceNetwork Reason = "source_network"
	ReasonSourceRegion  Reason = "source_region"

	ReasonRequestSignature Reason = "request_signature"
)

// Reasons says what each reason means and the number of the check that gives
// it. docs/protocol.md has the same table.
var Reasons = []struct {
	Reason Reason
	Check  int
	What   string
}{
	{ReasonForm, 1, "the text is too large or not a JWS in compact serialisation"},
	{ReasonHeader, 2, "typ, alg or another header parameter is not one that is allowed"},
	{ReasonCertificate, 3, "the certificate is missing, malformed, not for agent actions, or does not chain to the CA"},
	{ReasonExpired, 3, "the certificate is not valid at this time"},
	{ReasonRevoked, 4, "the certificate was revoked"},
	{ReasonRevocation, 4, "whether the certificate was revoked is not known freshly enough"},
	{ReasonSignature, 5, "the signature does not verify over the exact bytes"},
	{ReasonStatement, 5, "what was signed is not a permit statement of this certificate in its one spelling"},
	{ReasonAudience, 6, "the action is for another venue"},
	{ReasonStale, 7, "the action has expired, or lives for too long"},
	{ReasonFuture, 7, "the action is from the future"},
	{ReasonReplay, 8, "the action was seen before"},
	{ReasonCounter, 8, "the action's counter was seen before, or is older than the window"},
	{ReasonStore, 8, "the store of seen actions does not work"},
	{ReasonBody, 9, "the message that arrived is not the one that was signed for"},
	{ReasonRequest, 10, "the request has a query, a content coding, or a path in more than one spelling"},
	{ReasonRoute, 10, "no route has this method and path"},
	{ReasonKind, 10, "the route does not take actions of this kind"},
	{ReasonMismatch, 10, "the message says something else than the action that was signed"},
	{ReasonPolicy, 11, "the action was decided under another scope than the certificate's, or under a policy that is not known, not in force, or not inside the certificate"},
	{ReasonScope, 12, "the action is outside the scope in the certificate, or outside the policy"},
	{ReasonLimits, 13, "the action is outside the limits over time in the certificate's scope, together with what the agent did at this venue before"},
	{ReasonAttestation, 14, "the evidence behind the certificate is too old"},
	{ReasonKilled, 15, "the issuer stopped the agent, and the action is no cancel"},
	{ReasonKillState, 15, "whether the issuer stopped the agent is not known freshly enough"},
	{ReasonSourceNetwork, 17, "the scope names networks, and the request does not come from one of them"},
	{ReasonSourceRegion, 17, "the scope names regions, and the request is not known to come from one of them"},
	{ReasonRequestSignature, 18, "the request's own signature is missing where it is required, does not verify, or is another agent's than the action"},
}

// Refusal says why a receiver refuses. Reason decides; Detail is a sentence for
// whoever sent what is refused, and Error is made of these two alone. Cause is what went
// wrong inside, such as an error of a database: it is for the receiver's own log, and
// never for an answer.
type Refusal struct {
	Reason Reason `json:"reason"`
	Detail string `json:"detail"`
	Cause  error  `json:"-"`
}

func (r *Refusal) Error() string { return string(r.Reason) + ": " + r.Detail }

// Is makes errors.Is(err, &Refusal{Reason: r}) ask for the reason.
func (r *Refusal) Is(target error) bool {
	t, ok := target.(*Refusal)
	return ok && t.Reason == r.Reason
}

// Unwrap returns the cause.
func (r *Refusal) Unwrap() error { return r.Cause }

func refuse(reason Reason, format string, a ...any) error {
	return &Refusal{Reason: reason, Detail: fmt.Sprintf(format, a...)}
}

// own says of a reason that lies with the receiver what it means for who sent the
// action; cause is for the log.
func own(reason Reason, cause error) error {
	return &Refusal{Reason: reason, Detail: whatToDo[reason], Cause: cause}
}

// whatToDo is what a client can do about a receiver's own trouble.
var whatToDo = map[Reason]string{
	ReasonRevocation:    "this receiver cannot tell now whether the certificate was revoked; the action is not used up: send it again before it expires",
	ReasonKillState:     "this receiver cannot tell now whether the agent was stopped; the action is not used up: send it again before it expires",
	ReasonStore:         "this receiver cannot keep the action now, so it did not accept it: send it again before it expires, and if it is refused as seen before, sign another",
	ReasonSourceNetwork: "the proxy before this receiver did not say in the one form that is expected where the request comes from: tell the venue",
}
