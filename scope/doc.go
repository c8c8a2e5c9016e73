// Package scope says what an agent may do: [Check] holds an [Action] against a
// [Scope] and gives a [Permit] or a [Refusal]; [Contains] says whether one
// scope allows nothing that another does not.
//
// It is pure: it reads no clock, no file and no network. All of its values have
// one spelling, so equal meaning is equal bytes. docs/scope.md is the
// specification; testdata/vectors holds it as test vectors.
package scope
