// method_states.h - what the methods keep from step to step. Private.
#pragma once

#include "aggregator_state.h"
#include "flatness_state.h"
#include "weighting_state.h"

namespace flatmtl {
namespace detail {

// Values: a step reads these and makes new ones, so that a step that fails has changed nothing.
struct MethodStates {
  AggregatorState aggregator;
  WeightingState weighting;
  FlatnessState flatness;
};

}  // namespace detail
}  // namespace flatmtl
