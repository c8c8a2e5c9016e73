// Package problem writes errors of HTTP APIs in the form of RFC 9457: see
// [Write].
package problem

import (
	"net/http"
	"time"

	"inkan/internal/strictjson"
)

// ContentType of a problem document.
const ContentType = "application/problem+json"

// Problem is a problem document. Exactly one of Rule, Check and Reason may be
// set: the stable name of what refused.
type Problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail,omitempty"`
	Rule   string `json:"rule,omitempty"`   // of a scope
	Check  string `json:"check,omitempty"`  // of attestation
	Reason string `json:"reason,omitempty"` // of a receiver
	Field  string `json:"field,omitempty"`  // of the action
	Value  string `json:"value,omitempty"`
	Limit  string `json:"limit,omitempty"`
	Excess string `json:"excess,omitempty"`

	// Of limits over time:
	Key    string    `json:"key,omitempty"` // what the limit is for, such as a currency
	Used   string    `json:"used,omitempty"`
	Left   string    `json:"left,omitempty"`
	Block  string    `json:"block,omitempty"`  // soft: a second person can lift it for one action
	FreeAt time.Time `json:"free_at,omitzero"` // before then it is refused again
}

func (p *Problem) Error() string {
	name := p.Rule + p.Check + p.Reason
	switch {
	case name != "":
		return name + ": " + p.Detail
	case p.Detail != "":
		return p.Detail // the title says less
	}
	return p.Title
}

// Write answers with p. Type and Title are filled in where they are empty.
func Write(w http.ResponseWriter, p Problem) {
	if p.Type == "" {
		p.Type = "about:blank"
	}
	if p.Title == "" {
		p.Title = http.StatusText(p.Status)
	}
	b, err := strictjson.Marshal(p)
	if err != nil {
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", ContentType)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(p.Status)
	_, _ = w.Write(b) // the client may be gone
}

// JSON answers with a JSON document.
func JSON(w http.ResponseWriter, status int, v any) {
	b, err := strictjson.Encode(v)
	if err != nil {
		Write(w, Problem{Status: http.StatusInternalServerError})
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(b) // the client may be gone
}

// Parse reads a problem document, or makes one from the status.
func Parse(status int, contentType string, body []byte) *Problem {
	p := &Problem{}
	if contentType == ContentType && strictjson.Unmarshal(body, 64<<10, p) == nil && p.Status == status {
		return p
	}
	return &Problem{Status: status, Title: http.StatusText(status)}
}
