// Package dashboards holds the engine's metrics against those who read them: the queries of published dashboards and
// autoscalers are evaluated by Prometheus' own engine over recorded scrapes, and the scrapes are held to the rules of
// `promtool check metrics`.
//
// The recordings in testdata are of the real server; a test of engine-server fails when their series are not its own.
package dashboards
