package gate

import (
	"errors"
	"fmt"
	"net/http"

	"inkan/internal/problem"
	"inkan/verify"
)

// The reasons that a gate adds to those of package verify, in the order in
// which it checks. certificate_expired, certificate_revoked and
// revocation_unknown are verify's; here their detail names the TLS certificate.
const (
	ReasonRate    verify.Reason = "rate"
	ReasonClient  verify.Reason = "client_certificate"
	ReasonAgent   verify.Reason = "agent"
	ReasonNetwork verify.Reason = "network"
	ReasonPeer    verify.Reason = "peer"
	ReasonRecord  verify.Reason = "record"
	ReasonBackend verify.Reason = "backend"
)

// Reasons says what each reason means, and its HTTP status.
var Reasons = []struct {
	Reason verify.Reason
	Status int
	What   string
}{
	{ReasonRate, http.StatusTooManyRequests, "there are more requests of this address or agent than it may send, or more than can be checked"},
	{ReasonClient, http.StatusForbidden, "the TLS client certificate is missing, or is not that of an agent of the trust domain"},
	{ReasonAgent, http.StatusForbidden, "the agent is not one that may come"},
	{ReasonNetwork, http.StatusForbidden, "the agent may not come from this address"},
	{ReasonPeer, http.StatusForbidden, "the action is of another agent than the TLS connection, or both use one key"},
	{ReasonRecord, http.StatusServiceUnavailable, "the accepted action could not be recorded"},
	{ReasonBackend, http.StatusBadGateway, "the backend did not answer"},
}

func refuse(reason verify.Reason, format string, a ...any) error {
	return &verify.Refusal{Reason: reason, Detail: fmt.Sprintf(format, a...)}
}

func status(reason verify.Reason) int {
	switch reason {
	case verify.ReasonExpired, verify.ReasonRevoked:
		return http.StatusUnauthorized
	case verify.ReasonRevocation:
		return http.StatusServiceUnavailable
	}
	for _, r := range Reasons {
		if r.Reason == reason {
			return r.Status
		}
	}
	return http.StatusInternalServerError
}

// answer remembers err for the log, and answers with the refusal in it: without its
// cause, and of any other error nothing is told.
func (x *exchange) answer(w http.ResponseWriter, err error) {
	x.refused = err
	r, ok := errors.AsType[*verify.Refusal](err)
	if !ok {
		problem.Write(w, problem.Problem{Status: http.StatusInternalServerError})
		return
	}
	problem.Write(w, problem.Problem{Status: status(r.Reason), Title: "request refused", Reason: string(r.Reason), Detail: r.Detail})
}
